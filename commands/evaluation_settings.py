"""Settings of `run_evaluation.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from commands.channels import ChannelFlags
from commands.flags import COUNT, POSITIVE, flag
from commands.settings import CommandLine, Settings, SettingsError
from evaluation.frozen import PROBES
from evaluation.preprocessing import BATCH_SIZE


@dataclass(frozen=True, kw_only=True)
class EvaluationDataFlags:
    title: ClassVar = "model and data"

    model: str = flag(None, "folder or Hub id of the encoder")
    trust_remote_code: bool = flag(False, "run the Python files that --model brings; read them first")
    dataset: list[str] = flag(
        [],
        "folder of class folders, Hub id, idx files, labeled shards or 'sample-fashion'; with --dense images/ and "
        "masks/ in a folder or a Hub id with masks; with --embed any images",
    )
    label_column: str | None = flag(
        None, "column with the classes, if the data is a table (default: found by type and name)"
    )
    labels_per_class: int | None = flag(None, "train on this number of labels of each class (default: all)", COUNT)
    class_file: str | None = flag(
        None, "with --dense: file with a class on each line (default: classes.txt of the data, or read from the masks)"
    )
    ignore_index: int = flag(255, "with --dense: value of the pixels of masks that do not count")
    mask_column: str | None = flag(None, "with --dense: column with the masks of a table (default: found by its name)")
    shard_cache_gb: float = flag(
        20.0, "size of the folder that keeps what was read of remote and parquet shards", POSITIVE
    )


@dataclass(frozen=True, kw_only=True)
class MeasurementFlags:
    title: ClassVar = "measurement"

    probes: list[str] = flag(
        list(PROBES), "classifiers to train on the frozen features (default: all)", choices=PROBES
    )
    dense: bool = flag(False, "segment images with masks by classifiers of each patch, instead of classifying images")
    compare_with: str | None = flag(None, "with --dense: folder or Hub id of a second encoder")
    embed: Path | None = flag(None, "write the features of all images to this .parquet file instead")
    embed_patches: bool = flag(False, "with --embed: write the features of every patch too")


@dataclass(frozen=True, kw_only=True)
class EvaluationRunFlags:
    title: ClassVar = "run"

    config: str | None = flag(None, "recipe: a YAML file of flag names; the command line overrides it")
    output_dir: str | None = flag(None, "where all files go (default: outputs/evaluation-<model>-<dataset>)")
    per_device_eval_batch_size: int = flag(BATCH_SIZE, "images per forward pass", COUNT)
    seed: int = flag(0, "seed of all random numbers")
    use_cpu: bool = flag(False, "do not use the GPU")
    debug: bool = flag(False, "show Python tracebacks of errors")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(EvaluationDataFlags, ChannelFlags, MeasurementFlags, EvaluationRunFlags, Settings):
    """Settings of an evaluation of frozen features."""

    program: ClassVar = {
        "prog": "run_evaluation.py",
        "usage": "python run_evaluation.py --model ENCODER --dataset LABELED [--flag value ...]",
        "description": "Evaluate the frozen features of an encoder by kNN and probes on labeled images, or write the "
        "features to a file.",
        "epilog": "precedence: defaults < --config < command line. --labels-per-class is --labels_per_class.\n",
    }
    successors: ClassVar = {"batch_size": "--per_device_eval_batch_size", "no_cuda": "--use_cpu", "data": "--dataset"}

    def __post_init__(self) -> None:
        if self.embed and self.embed.suffix != ".parquet":
            raise SettingsError(f"--embed is {self.embed}, expected the name of a .parquet file")
        for name in ("labels_per_class", "output_dir", "label_column"):
            if self.embed and self.values[name]:
                raise SettingsError(f"--{name} has no effect with --embed, which only writes features")
        if self.embed_patches and not self.embed:
            raise SettingsError("--embed_patches has no effect without --embed")
        if self.embed and self.dense:
            raise SettingsError("--dense has no effect with --embed, which only writes features")
        for name in ("compare_with", "class_file", "mask_column"):
            if self.values[name] and not self.dense:
                raise SettingsError(f"--{name} has no effect without --dense")
        if self.dense and self.labels_per_class:
            raise SettingsError("--labels_per_class has no effect with --dense: images have masks instead of a class")


def load_evaluation_settings(argv: Sequence[str]) -> EvaluationSettings:
    """Resolve the settings of an evaluation; raises SettingsError if they are invalid."""
    command_line = CommandLine(EvaluationSettings, argv)
    command_line.require(model="the encoder", dataset="the images")
    return command_line.resolve({})
