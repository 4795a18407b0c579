"""The table and the plot of `benchmarks.hour`."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = {"knn": "kNN", "logistic": "logistic regression", "fine-tuned": "fine-tuned"}
RAW_PIXELS = "raw pixels"
_COLORS = {"ours": "#1f6fb4", "other code": "#d9730d", "references": "#777777"}
_MARKERS = {"knn": "o", "logistic": "s", "fine-tuned": "D"}

Scores = Mapping[str, Mapping[str, Any]]  # of a row, by seed


def markdown(report: Mapping[str, Any], order: Mapping[str, Sequence[str]]) -> str:
    settings = report["settings"]
    number = settings["num_threads"]
    threads = f"{number} thread{'s' if number > 1 else ''}" if number else "all cores"
    lines = [
        f"# {settings['minutes']:g} minutes of training with {settings['model']}",
        "",
        f"{report['date']}, {report['hardware']}, {report['versions']}: `{report['command']}`",
        "",
        f"Every row has the same encoder size, images and time, {threads}, float32. "
        "The time is that of training steps at the measured speed. kNN and logistic regression are on frozen "
        "features, chosen on training images among class token, mean of patches and both. Accuracy, mean +- standard "
        "deviation over the seeds; images/s is the median of the rounds. An effective rank (RankMe) near 1 is a "
        "collapsed encoder.",
    ]
    for name, found in report["sets"].items():
        for split in splits_of(found):
            lines += ["", f"## {name}, {split} images", "", f"Trained on {found['description']}.", ""]
            if split == "validation":
                lines += ["The encoders saw the validation images too, without labels.", ""]
            lines += table(found, split, order)
    return "\n".join(lines)


def splits_of(found: Mapping[str, Any]) -> list[str]:
    seen = {split for of_row in found["scores"].values() for split in of_row}
    return [split for split in ("validation", "test") if split in seen]


def table(found: Mapping[str, Any], split: str, order: Mapping[str, Sequence[str]]) -> list[str]:
    rows = list(rows_of(found, split, order))
    scored = {key for _, scores in rows for each in scores.values() for key in each}
    columns = {key: title for key, title in COLUMNS.items() if key in scored}
    lines = [
        f"| | images/s | images per step | images, thousands | {' | '.join(columns.values())} | RankMe | seeds |",
        "|---" * (6 + len(columns)) + "|",
    ]
    failures = []
    for row, scores in rows:
        good = {seed: each for seed, each in scores.items() if "failed" not in each}
        failures += [
            f"- {row}, seed {seed}: {each[kind]}"
            for seed, each in scores.items()
            for kind in ("failed", "fine-tuning failed")
            if kind in each
        ]
        speed = found["speeds"].get(row, {}).get("stages", [])
        cells = [" + ".join(f"{stage['images_per_second']:.1f}" for stage in speed)]
        cells.append(" + ".join(f"{stage['images_per_step']:g}" for stage in speed))
        steps = next((each["steps"] for each in good.values() if "steps" in each), ())
        seen = [number * stage["images_per_step"] / 1000 for number, stage in zip(steps, speed, strict=False)]
        cells.append(" + ".join(f"{number:.0f}" for number in seen))
        cells += [mean_and_std([each[key] for each in good.values() if key in each], 3) for key in columns]
        cells.append(mean_and_std([each["rankme"] for each in good.values() if "rankme" in each], 1))
        lines.append(f"| {row} | {' | '.join(cells)} | {', '.join(good) or 'failed'} |")
    if failures:
        lines += ["", "Failed:", "", *failures]
    return lines


def rows_of(found: Mapping[str, Any], split: str, order: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Scores]]:
    """Yield the rows in order with their scores by seed, raw pixels first among the references."""
    for group, rows in order.items():
        if group == "references":
            yield RAW_PIXELS, pixels_of(found, split)
        for row in rows:
            if scores := found["scores"].get(row, {}).get(split):
                yield row, scores


def pixels_of(found: Mapping[str, Any], split: str) -> dict[str, dict[str, float]]:
    """Return the scores of raw pixels by seed, from any row whose encoder sees images of the same size."""
    pixels: dict[str, dict[str, float]] = {}
    for row, of_row in found["scores"].items():
        for seed, each in of_row.get(split, {}).items():
            if "failed" not in each and row in (*found["speeds"], "random weights"):
                pixels[seed] = {probe: each[f"{probe}, {RAW_PIXELS}"] for probe in ("knn", "logistic")}
    return dict(sorted(pixels.items()))


def mean_and_std(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def plot(report: Mapping[str, Any], order: Mapping[str, Sequence[str]], file: Path) -> None:
    """Draw the accuracies of all rows, one panel for each image set and split."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    panels = [(name, found, split) for name, found in report["sets"].items() for split in splits_of(found)]
    heights = [len(list(rows_of(found, split, order))) for _, found, split in panels]
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 1.6 + 0.34 * max(heights)), squeeze=False)
    fills = {"logistic": "white"}  # a square, easily taken for a diamond
    drawn: set[str] = set()
    group_of = {row: group for group, rows in order.items() for row in rows} | {RAW_PIXELS: "references"}
    for axis, (name, found, split) in zip(axes[0], panels, strict=True):
        rows = list(rows_of(found, split, order))
        for height, (row, scores) in enumerate(reversed(rows)):
            color = _COLORS[group_of[row]]
            good = [each for each in scores.values() if "failed" not in each]
            for key, marker in _MARKERS.items():
                values = [each[key] for each in good if key in each]
                if values:
                    drawn.add(key)
                    error = statistics.stdev(values) if len(values) > 1 else 0
                    filled = fills.get(key, color)
                    style = {"fmt": marker, "color": color, "markerfacecolor": filled, "markersize": 6}
                    axis.errorbar(statistics.mean(values), height, xerr=error, **style)
            if not good:
                axis.text(0.02, height, "failed", color=color, va="center", transform=axis.get_yaxis_transform())
            if row == RAW_PIXELS and good:
                axis.axvline(statistics.mean(each["knn"] for each in good), color="#bbbbbb", lw=0.8, zorder=0)
        axis.set_yticks(range(len(rows)), [row for row, _ in reversed(rows)])
        for label in axis.get_yticklabels():
            label.set_color(_COLORS[group_of[label.get_text()]])
        axis.set_title(f"{name}, {split} images", fontsize=11)
        axis.set_xlabel("accuracy (line: kNN on raw pixels)")
        axis.grid(axis="y", color="#eeeeee")
        axis.set_axisbelow(True)
    handles = [
        Line2D(
            [], [], marker=marker, color="#333333", ls="", markerfacecolor="white" if key == "logistic" else "#333333"
        )
        for key, marker in _MARKERS.items()
        if key in drawn
    ]
    figure.legend(
        handles, [label for key, label in COLUMNS.items() if key in drawn], loc="upper center", ncols=3, frameon=False
    )
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(file, dpi=110)
    plt.close(figure)
