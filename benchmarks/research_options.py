"""Compare research options with their absence at equal wall-clock: refinement, hybrid, and masks that adapt to images.

    python -m benchmarks.tuxstamps --size 96 --output_dir outputs/tuxstamps-96
    python -m benchmarks.research_options --minutes 10

A short run of each command gives its images per second, with decoding and cropping, on this computer. Then every
candidate is pre-trained for as many steps as it makes in --minutes, once for each seed; a refinement has half of them,
after an MAE of the other half. Learning rates and all else are those of the same method without the option. Encoders
are scored as in `decoder_quality.py`, on tuning/val.

Every finished command is kept in --output_dir, so that an interrupted benchmark continues. Writes
benchmarks/research_options_<model>_<date>.md.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import NamedTuple

from benchmarks.equal_time import Results, accuracies, hardware, make_parser, pretrain, score_all, table, write
from benchmarks.provenance import TODAY, command, versions

_SPEED_STEPS = 20


class Candidate(NamedTuple):
    """A method with an option: its flags, its learning rate for 64 images, and the candidate without the option.

    `begins_from` is a candidate that is trained for the first half of the time.
    """

    flags: tuple[str, ...]
    learning_rate: float
    without: str | None = None
    begins_from: str | None = None


_MAE, _SIMMIM, _REFINE = (("--method", method) for method in ("mae", "simmim", "refine"))
_ATTENTION, _HARD = ("--attention_masks", "true"), ("--hard_patch_share", "0.5")
CANDIDATES = {
    "mae": Candidate(_MAE, 1e-3),
    "hybrid": Candidate(("--method", "hybrid"), 1e-3, "mae"),
    "mae, hard patches": Candidate((*_MAE, *_HARD), 1e-3, "mae"),
    "mae, then refine": Candidate(_REFINE, 5e-4, "mae", begins_from="mae"),
    "simmim": Candidate(_SIMMIM, 1e-3),
    "simmim, hard patches": Candidate((*_SIMMIM, *_HARD), 1e-3, "simmim"),
    "data2vec": Candidate(("--method", "data2vec"), 5e-4),
    "data2vec, attention": Candidate(("--method", "data2vec", *_ATTENTION), 5e-4, "data2vec"),
    "ibot": Candidate(("--method", "ibot"), 5e-4),
    "ibot, attention": Candidate(("--method", "ibot", *_ATTENTION), 5e-4, "ibot"),
    "dinov2": Candidate(("--method", "dinov2"), 5e-4),
    "dinov2, attention": Candidate(("--method", "dinov2", *_ATTENTION), 5e-4, "dinov2"),
}


def main() -> None:
    parser = make_parser(__doc__, CANDIDATES)
    parser.set_defaults(minutes=10.0)
    parser.add_argument("--max_steps", type=int, help="of one pre-training, to try the benchmark")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/research_options"))
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    needed = {*options.candidates, *(CANDIDATES[name].begins_from for name in options.candidates)} - {None}
    speeds = {name: images_per_second(name, options) for name in CANDIDATES if name in needed}

    def pretrain_and_score(name: str, seed: int) -> dict[str, float]:
        candidate, folder = CANDIDATES[name], options.output_dir / slug(name)
        flags, share = candidate.flags, 1.0
        if candidate.begins_from is not None:
            first, share = folder / f"first-{seed}", 0.5
            flags = (*flags, "--init_from", str(first))
            before = CANDIDATES[candidate.begins_from]
            num_steps = steps_in(share, speeds[candidate.begins_from], options)
            pretrain(first, before.flags, num_steps, before.learning_rate, seed, options)
        num_steps, encoder = steps_in(share, speeds[name], options), folder / f"encoder-{seed}"
        pretrain(encoder, flags, num_steps, candidate.learning_rate, seed, options)
        return accuracies(encoder, seed, options)

    results = score_all(options, pretrain_and_score, images_per_second=speeds)
    write_results(options, speeds, results)


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def steps_in(share: float, images_per_second: float, options: argparse.Namespace) -> int:
    """Return the number of steps in a share of the time."""
    if options.max_steps:
        return int(options.max_steps)
    return max(20, round(share * options.minutes * 60 * images_per_second / options.batch_size))


def images_per_second(name: str, options: argparse.Namespace) -> float:
    """Return the median speed of a short run; it is made once, as the numbers of steps depend on it."""
    folder = options.output_dir / slug(name) / "speed"
    flags = (*CANDIDATES[name].flags, "--logging_steps", "5", "--eval_strategy", "no")
    pretrain(folder, flags, min(_SPEED_STEPS, options.max_steps or _SPEED_STEPS), 1e-4, 0, options)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found = [entry["images_per_second"] for entry in history if "images_per_second" in entry]
    return statistics.median(found[1:] or found)  # the first step warms up


def write_results(options: argparse.Namespace, speeds: dict[str, float], results: Results) -> None:
    columns = {
        "without": {name: CANDIDATES[name].without or "" for name in results},
        "images/s": {name: f"{speeds[name]:.1f}" for name in results},
    }
    lines = [
        f"# Research options of {options.model} at equal training time, {TODAY}",
        "",
        f"Command: `{command('research_options')}`",
        f"Trained on: {hardware()}, float32. {versions('torch', 'transformers', 'scikit-learn')}.",
        f"{options.minutes:g} minutes each; seeds {', '.join(map(str, options.seeds))}. Validation accuracy "
        "(tuning/val), mean +- standard deviation over the seeds. `without` names the row to compare with.",
        "",
        *table("candidate", columns, results),
    ]
    write(f"research_options_{options.model}", lines)


if __name__ == "__main__":
    main()
