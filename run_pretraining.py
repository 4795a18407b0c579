"""Pre-train an image encoder without labels: `accelerate launch run_pretraining.py --dataset ./photos`.

Settings -> images -> plan -> Trainer -> two artefacts: the root of the output folder is a native encoder that
`AutoModel.from_pretrained` opens, its `pretraining/` the whole model. `--help` lists the flags.
"""

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from transformers import AutoModelForPreTraining, PreTrainedModel, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import HubStrategy

from data.augmentations import CenterCrop, RandomResizedCrop, Transform, TwoViews
from data.collators import MaskingCollator
from data.image_checks import Checked, check_images
from data.images import PretrainingImages, count_bad_images, measure_image_stats, split_held_out
from data.sources import ImageSource, open_source
from evaluation.looks import summary as features_in_words
from evaluation.panels import pixel_panel_drawer, token_panel_drawer
from evaluation.pictures import MAX_ROWS, training_curve
from evaluation.watch import FeatureWatch, open_feature_watch
from hub.card_rules import license_problem
from hub.checkpoints import LAST_CHECKPOINT, fetch_checkpoint, stage_checkpoint
from hub.export import PRETRAINING, export, native_root_problem
from hub.init_from import StartingModel, open_starting_model
from hub.init_weights import read_weights
from hub.model_card import write_model_card
from hub.push import HubError, Repository
from hub.redaction import shorten_values
from modeling import CONFIGS, HEADS, MimConfig, MimPreTrainedModel
from modeling.patches import patch_grid
from training.callbacks import BadImagesLimit, CpuEstimate, MimProgress, ReconstructionPanels, duration
from training.checkpoints import last_whole_checkpoint
from training.guard import NonFiniteError
from training.hub_push import HubPush
from training.launch import check_world, has_accelerator, restore_threads
from training.output_folder import BAD_IMAGES_FILE, SETTINGS_FILE, interrupted_run, prepare_output_dir
from training.plan import Machine, Plan, default_output_dir, make_plan
from training.settings import Settings, load_settings
from training.targets import CHOICES as TOKENIZER_CHOICES
from training.targets import TokenizerLabels, load_tokenizer, tokenizer_view
from training.token_cache import cached_tokens
from training.trainer import MimTrainer
from training.watch import EveryFewSteps

WRITTEN_LAST = f"{PRETRAINING}/config.json"  # of a finished run
QUICKSTART = "accelerate launch run_pretraining.py --config recipes/quickstart.yaml"


@dataclass
class Images:
    """The readable images of one run; `held_out` indexes `held_out_source`."""

    source: ImageSource
    train: np.ndarray
    held_out_source: ImageSource
    held_out: np.ndarray
    bad: list[tuple[str, str]]
    summary: str


def main(argv: list[str]) -> None:
    settings = load_settings(argv, CONFIGS, starting_point)
    use_cpu = settings["use_cpu"] or not has_accelerator()
    state = PartialState(cpu=use_cpu)
    check_world(state.num_processes)
    say = printer(state)
    if (note := restore_threads()) and use_cpu:
        say(f"note: {note}")

    repository = open_repository(settings)
    tokenizer = open_tokenizer(settings)
    images = first_on_main(state, lambda: find_images(settings))
    config = head_config(settings, images, tokenizer)
    collator = build_collator(settings, config)
    machine = find_machine(state, use_cpu)
    found = f"{images.source.describe()}: {images.summary}"
    blank = without_weights(config)
    plan = make_plan(settings, machine, len(images.train), len(images.held_out), blank.num_parameters(), found)
    output_dir = plan.output_dir
    say(f"settings\n{settings.describe()}\n\n{plan.describe()}")
    for name, reason in images.bad[:10]:
        say(f"note: left out {name}: {reason}")
    if problem := native_root_problem(blank):
        say(f"note: only {PRETRAINING}/ will be written, and no encoder for AutoModel: {problem}")
    weights = initial_weights(settings, blank, say)
    watch = open_watch(settings, state)
    if settings["dry_run"]:
        return

    def prepare() -> Path | None:
        if repository is not None:
            bring_back(repository, settings, output_dir, say)
        return prepare_output_dir(output_dir, settings, images.bad, say, WRITTEN_LAST)

    checkpoint = first_on_main(state, prepare)
    trainer = build_trainer(settings, plan, config, collator, images, tokenizer)
    trainer.model.load_state_dict(weights, strict=False)
    hub_push = None
    if repository is not None:
        hub_push = build_hub_push(trainer, settings, images, output_dir, argv, repository, say)
        trainer.add_callback(hub_push)
    if watch is not None:
        say(f"features watched: {watch.describe()}")
        every = int(plan.training_arguments()["eval_steps"])
        trainer.add_callback(EveryFewSteps(trainer, every, watch, features_in_words))
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    finish(trainer, settings, images, output_dir, argv)
    say(
        f"{output_dir}: {'' if problem else 'encoder for AutoModel.from_pretrained, '}whole model in {PRETRAINING}/, "
        "pictures in panels/, card in README.md"
    )
    if hasattr(trainer, "end"):  # absent in transformers 5.17
        trainer.end()
    if hub_push is not None and state.is_main_process:
        hub_push.finish()


def find_machine(state: PartialState, use_cpu: bool) -> Machine:
    has_bf16 = not use_cpu and state.device.type == "cuda" and torch.cuda.is_bf16_supported()
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    device_type = "cpu" if use_cpu else state.device.type
    return Machine(device_type, num_cpus, state.num_processes, num_local_processes, has_bf16)


# ---- what it begins from ----


def starting_point(chosen: Mapping[str, Any]) -> StartingModel:
    """What `--init_from` names; an interrupted run's own checkpoint tells as much, and the rest may be gone by now."""
    checkpoint = interrupted_run(Path(chosen.get("output_dir") or default_output_dir(chosen)), chosen)
    name = str(checkpoint or chosen["init_from"])
    return open_starting_model(name, chosen["method"], sizes_only=checkpoint is not None)


def initial_weights(
    settings: Settings, head: MimPreTrainedModel, say: Callable[[str], None]
) -> Mapping[str, torch.Tensor]:
    """Of the model that the run begins from, by the names of `head`; nothing from scratch or for a continued run.

    Raises:
        ValueError: they cannot be read, or would not do.
    """
    start = settings.start
    if not isinstance(start, StartingModel) or start.sizes_only:
        return {}
    weights = read_weights(start, head, settings["repair_positions"])
    for note in weights.notes:
        say(f"note: {note}")
    return weights.state


# ---- images ----


def find_images(settings: Settings) -> Images:
    """Open what `--dataset` names, look at every header, and set a part aside."""
    source = open_source(settings["dataset"])
    checked = _check(source, settings)
    own_part = source.held_out()
    if own_part is not None and settings["validation_fraction"]:
        held_out_checked = _check(own_part, settings)
        bad = checked.bad + held_out_checked.bad
        return Images(source, checked.good, own_part, held_out_checked.good, bad, checked.summary.describe())
    train, held_out = split_held_out(len(checked.good), settings["validation_fraction"], settings["seed"])
    good = checked.good
    return Images(source, good[train], source, good[held_out], checked.bad, checked.summary.describe())


def open_watch(settings: Settings, state: PartialState) -> FeatureWatch | None:
    """What `--eval_dataset` names, in the first process, which does the looking; a mistake is told to all."""
    opened: list[FeatureWatch] = []
    if (dataset := settings["eval_dataset"]) is not None:
        wanted = (settings.image_size, settings["num_channels"], settings["seed"])
        first_on_main(state, lambda: opened.append(open_feature_watch(dataset, *wanted)))
    return opened[0] if opened else None


@dataclass
class Tokenizer:
    """An image tokenizer with the view that it wants: one token per patch."""

    model: PreTrainedModel
    view_size: tuple[int, int]
    vocab_size: int


def open_tokenizer(settings: Settings) -> Tokenizer | None:
    """What `--tokenizer` names, checked against the patches; never a substitute.

    Raises:
        ValueError: the method needs one and none is given, or the other way round, or it does not fit.
    """
    name, needed = settings["tokenizer"], HEADS[settings["method"]].needs_tokenizer
    if not needed:
        for flag in ("tokenizer", "cache_tokens"):
            if settings[flag]:
                raise ValueError(f"--{flag} has no effect with --method {settings['method']}; leave it out")
        return None
    if not name:
        raise ValueError(TOKENIZER_CHOICES.format(dataset=shlex.join(settings["dataset"])))
    model = load_tokenizer(name)
    view_size, vocab_size = tokenizer_view(model, name, patch_grid(settings.image_size, settings["patch_size"]))
    return Tokenizer(model, view_size, vocab_size)


def head_config(settings: Settings, images: Images, tokenizer: Tokenizer | None = None) -> MimConfig:
    """The method's own config: the encoder's sizes, the head's settings, and how pixels are standardised."""
    stats: dict[str, Any] = {}
    if settings["image_stats"] == "source" and settings.start is not None:
        stats = dict(settings.start.image_stats)
    if settings["image_stats"] == "auto":
        crop = CenterCrop(settings.image_size)
        measured = PretrainingImages(
            images.source, images.train, crop, settings["num_channels"], settings["seed"], 1, None, train=False
        )
        stats = dict(zip(("image_mean", "image_std"), measure_image_stats(measured), strict=True))
    if tokenizer is not None:
        if settings.is_given("vocab_size") and settings["vocab_size"] != tokenizer.vocab_size:
            raise ValueError(
                f"--vocab_size {settings['vocab_size']}: the tokenizer has {tokenizer.vocab_size} codes; leave it out"
            )
        stats["vocab_size"] = tokenizer.vocab_size
    return CONFIGS[settings["method"]](
        encoder_config=settings.encoder_settings(), **{**settings.head_settings(), **stats}
    )


def without_weights(config: MimConfig) -> MimPreTrainedModel:
    """The head, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForPreTraining.from_config(config)


def _check(source: ImageSource, settings: Settings) -> Checked:
    return check_images(source, settings["max_bad_fraction"], num_threads=min(8, os.cpu_count() or 1))


# ---- training ----


def build_collator(settings: Settings, config: MimConfig) -> MaskingCollator:
    """Masks for the encoder's patches.

    Raises:
        ValueError: the masks would hide a part of what the encoder merges into one token.
    """
    side = config.prediction_side
    if settings.mask_unit * settings["patch_size"] % side:
        raise ValueError(
            f"--model {settings['model']} makes one token of {side} x {side} pixels, which a mask must hide whole: "
            f"use --mask_strategy random-unit with a --mask_unit of {side} or a multiple"
        )
    return MaskingCollator(
        grid=patch_grid(config.encoder_config.image_size, config.encoder_config.patch_size),
        mask_ratio=settings.mask_ratio,
        strategy=settings["mask_strategy"],
        seed=settings["seed"],
        mask_unit=settings.mask_unit,
        equal_num_masked=HEADS[settings["method"]].needs_equal_num_masked,
        with_image_index=True,
    )


def build_trainer(
    settings: Settings,
    plan: Plan,
    config: MimConfig,
    collator: MaskingCollator,
    images: Images,
    tokenizer: Tokenizer | None = None,
) -> MimTrainer:
    """Everything of the run as objects: data, masks, head, trainer and what a person sees."""
    output_dir = plan.output_dir
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output_dir / "runs"))
    arguments = TrainingArguments(**plan.training_arguments())
    set_seed(settings["seed"])
    head = AutoModelForPreTraining.from_config(config)
    height, width = settings.image_size
    ratio = (3 / 4 * width / height, 4 / 3 * width / height)  # a wide crop for a wide input, not a squashed one
    jitter = settings["color_jitter"]
    resampling = Image.Resampling[settings["interpolation"].upper()]
    crop = RandomResizedCrop(settings.image_size, tuple(settings["crop_scale"]), ratio, resampling, jitter)

    def dataset(source: ImageSource, indices: np.ndarray, train: bool) -> PretrainingImages:
        is_fixed = settings["cache_tokens"] or not train
        view = CenterCrop(settings.image_size, resampling) if is_fixed else crop
        transform: Transform = view if tokenizer is None else TwoViews(view, tokenizer.view_size)
        bad_images = output_dir / BAD_IMAGES_FILE
        return PretrainingImages(
            *(
                source,
                indices,
                transform,
                settings["num_channels"],
                settings["seed"],
                plan.images_per_step,
                bad_images,
            ),
            train=train,
        )

    train = dataset(images.source, images.train, train=True)
    held_out = dataset(images.held_out_source, images.held_out, train=False) if len(images.held_out) else None
    trainer = MimTrainer(
        model=head, args=arguments, train_dataset=train, eval_dataset=held_out, data_collator=collator
    )
    trainer.lr_drop_step = plan.lr_drop_step
    trainer.layer_decay = settings["layer_decay"]
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(MimProgress())
    trainer.add_callback(BadImagesLimit(output_dir / BAD_IMAGES_FILE, len(images.train), settings["max_bad_fraction"]))
    if arguments.device.type == "cpu":
        trainer.add_callback(CpuEstimate(QUICKSTART))
    shown = held_out if held_out is not None else train.at_center()
    batch = collator([shown[index] for index in panel_indices(len(shown))])
    board = [c for c in trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback)]
    draw = pixel_panel_drawer(settings["method"])
    if tokenizer is not None:
        trainer.make_labels = TokenizerLabels(tokenizer.model, arguments.device)
        if settings["cache_tokens"]:
            keep_tokens(trainer)
        draw = token_panel_drawer(settings["method"], trainer.make_labels, collator.grid)
    if tokenizer is not None and not hasattr(tokenizer.model, "decode"):
        print("note: this tokenizer has no decoder, so there are no reconstruction panels", file=sys.stderr)
        return trainer
    trainer.add_callback(ReconstructionPanels(output_dir / "panels", batch, draw, board[0] if board else None))
    return trainer


def keep_tokens(trainer: MimTrainer) -> None:
    """The training images' tokens from a file, which the main process makes first; then one view of each is enough."""
    images = trainer.train_dataset
    state, labels = PartialState(), trainer.make_labels
    assert isinstance(labels, TokenizerLabels)
    file = first_on_main(state, lambda: cached_tokens(images, labels, trainer.output_dir, printer(state)))
    images.labels = np.load(file, mmap_mode="r")  # which the workers share
    images.transform = images.transform.crop


def panel_indices(num_images: int) -> list[int]:
    """Up to eight images, spread evenly, so that neighbours of one scene are not all that is seen."""
    return np.linspace(0, num_images - 1, min(MAX_ROWS, num_images)).round().astype(int).tolist()


# ---- the end ----


def finish(trainer: MimTrainer, settings: Settings, images: Images, output_dir: Path, argv: list[str]) -> None:
    """Check the weights, evaluate once more if the last evaluation is older, and write both artefacts and the card."""
    trainer.stop_if_not_finite()
    evaluated = {entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry}
    if trainer.eval_dataset is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_artefacts(trainer, settings, images, output_dir, argv, output_dir)
    trainer.accelerator.wait_for_everyone()


def write_artefacts(
    trainer: MimTrainer,
    settings: Settings,
    images: Images,
    output_dir: Path,
    argv: list[str],
    folder: Path,
    unfinished: str | None = None,
) -> None:
    """Encoder, whole model and card of the run in `output_dir` as it is now, into `folder`."""
    head = trainer.accelerator.unwrap_model(trainer.model)
    # Folders of the user's machine do not belong into a config that goes to the Hub.
    export(head, folder, method=settings["method"], recipe=shorten_values(settings.as_recipe()))
    write_card(trainer, settings, images, output_dir, argv, folder, unfinished)


def write_card(
    trainer: MimTrainer,
    settings: Settings,
    images: Images,
    output_dir: Path,
    argv: list[str],
    folder: Path,
    unfinished: str | None,
) -> None:
    head, history = trainer.accelerator.unwrap_model(trainer.model), trainer.state.log_history
    curve = panel = None
    if any("loss" in entry or "eval_loss" in entry for entry in history):
        training_curve(history, folder / (curve := "training_curve.png"))
    if panels := sorted((output_dir / "panels").glob("*.png")):
        shutil.copy(panels[-1], folder / (panel := "reconstructions.png"))
    metrics = {
        name: [entry[key] for entry in history if key in entry][-1]
        for name, key in (("train_loss", "loss"), ("eval_loss", "eval_loss"))
        if any(key in entry for entry in history)
    }
    bad = count_bad_images(output_dir / BAD_IMAGES_FILE)
    write_model_card(
        folder,
        command=shlex.join([*launcher(), "run_pretraining.py", *argv]),
        method=settings["method"],
        model_name=settings["hub_model_id"] or output_dir.name,
        base_model=settings["init_from"],
        recipe=settings.as_recipe(),
        data_summary={
            "dataset": images.source.describe(),
            "training images": len(images.train),
            "held-out images": len(images.held_out),
            "sizes": images.summary,
            "unreadable images left out": len(bad),
        },
        metrics=metrics,
        versions=software_and_hardware(trainer),
        panel=panel,
        curve=curve,
        license=settings["license"],
        datasets=settings["dataset"],
        unfinished=unfinished,
        num_extra_tokens=sum(hasattr(head.encoder.embeddings, f"{kind}_token") for kind in ("cls", "distillation")),
        pools_mean=getattr(head.encoder.config, "use_mean_pooling", False),
        native_root_problem=native_root_problem(head),
    )


def software_and_hardware(trainer: MimTrainer) -> dict[str, str]:
    runtime = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    return {
        **{name: version(name) for name in ("transformers", "torch", "accelerate", "datasets")},
        "python": platform.python_version(),
        "hardware": f"{trainer.args.world_size} x {_device_name(trainer.args.device)}",
        **({"training time": duration(sum(runtime))} if runtime else {}),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def launcher() -> list[str]:
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return ["accelerate", "launch"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    return ["python"]


# ---- the Hub ----


def open_repository(settings: Settings) -> Repository | None:
    """Where `--push_to_hub` goes; nothing is asked of the Hub yet.

    Raises:
        ValueError: it cannot be the id of a repository, or the Hub would refuse the licence.
    """
    if settings["license"] and (problem := license_problem(settings["license"])):
        raise ValueError(f"--{problem}")
    if not settings["push_to_hub"]:
        return None
    names = ("hub_model_id", "hub_private_repo", "hub_token", "hub_revision")
    return Repository(*(settings[name] for name in names))


def bring_back(repository: Repository, settings: Settings, output_dir: Path, say: Callable[[str], None]) -> None:
    """A checkpoint that another machine pushed, into an output folder that has none."""
    keeps_states = HubStrategy(settings["hub_strategy"]) in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
    starts_anew = settings["overwrite"] or settings["resume"] == "never"
    if not keeps_states or starts_anew or settings["resume_from_checkpoint"]:
        return
    if (output_dir / WRITTEN_LAST).exists() or last_whole_checkpoint(output_dir)[0] is not None:
        return
    try:
        found = fetch_checkpoint(repository, output_dir, SETTINGS_FILE)
    except HubError as error:
        say(
            f"note: the run begins anew, for no checkpoint of it could be fetched from the Hub ({error}); "
            "if there is one, stop now and try again"
        )
        return
    if found is not None:
        say(f"found a checkpoint of this run in {repository.url}: {found}")


def build_hub_push(
    trainer: MimTrainer,
    settings: Settings,
    images: Images,
    output_dir: Path,
    argv: list[str],
    repository: Repository,
    say: Callable[[str], None],
) -> HubPush:
    """Uploads at every save what `finish` writes at the end, and training states if `--hub_strategy` asks for them."""
    strategy = HubStrategy(settings["hub_strategy"])
    names: dict[HubStrategy, Callable[[int], str]] = {
        HubStrategy.CHECKPOINT: lambda step: LAST_CHECKPOINT,
        HubStrategy.ALL_CHECKPOINTS: lambda step: f"checkpoint-{step}",
    }

    def stage(folder: Path, checkpoint_name: str | None) -> None:
        step, last = trainer.state.global_step, trainer.state.max_steps
        unfinished = f"Training goes on: this is step {step:,} of {last:,}." if step < last else None
        write_artefacts(trainer, settings, images, output_dir, argv, folder, unfinished)
        if checkpoint_name is not None:
            checkpoint = output_dir / f"checkpoint-{step}"
            stage_checkpoint(checkpoint, output_dir / SETTINGS_FILE, folder / checkpoint_name)

    at_saves = strategy is not HubStrategy.END
    return HubPush(repository, output_dir, stage, say, names.get(strategy), at_saves)


# ---- several processes, one voice ----


def printer(state: PartialState) -> Callable[[str], None]:
    """Prints on the first process only."""
    return lambda text: print(text, flush=True) if state.is_main_process else None


def first_on_main(state: PartialState, work: Callable[[], Any]) -> Any:
    """Run on one process and hand the result, or the user's mistake, to all: no rank is left waiting."""
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = work()
        except ValueError as error:
            outcome[1] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def run(argv: list[str], main: Callable[[list[str]], None] = main, name: str = "run_pretraining.py") -> int:
    """`main` with a user's mistakes told in one message instead of a traceback; returns the exit code."""
    transformers.utils.logging.disable_progress_bar()  # of reading and writing weights
    wants_traceback = "--debug" in argv
    if not wants_traceback:
        transformers.utils.logging.set_verbosity_error()
        huggingface_hub.utils.logging.set_verbosity_error()
    try:
        main(argv)
    except (ValueError, NonFiniteError) as error:
        if wants_traceback:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 3
    finally:
        if torch.distributed.is_initialized():  # left to the interpreter's end, gloo's threads sometimes abort it
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
