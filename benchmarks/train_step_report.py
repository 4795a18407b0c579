"""The table and the bars of `benchmarks.train_step`."""

from pathlib import Path
from typing import Any

import matplotlib

STOCK = "stock"  # the side of transformers


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Training step, ours against the classes of transformers",
        "",
        f"{report['date']}, {report['hardware']}, {report['versions']}, {report['precision']}: `{report['command']}`",
        "",
        f"Medians of {report['num_repeats']} repeats of {report['num_steps']} steps, fastest and slowest repeat in "
        "brackets; the ratio is the median of the repeats' ratios. FLOPs as in the log of a training: matrix "
        "products, three times those of the forward pass. Losses: of the first step, and of the last one.",
        "",
        "| case | side | ms per step | images/s | times faster | GFLOP/image | TFLOP/s (MFU) | peak memory | losses |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for case, rows in report["cases"].items():
        label = case
        for name, row in rows.items():
            if row.get("remark"):
                notes.append(f"- {case}, {name}: {row['remark']}.")
            if row.get("graph_breaks"):
                notes.append(f"- {case}, {name}: {row['graph_breaks']} graph breaks.")
            if "error" in row:
                notes.append(f"- {case}, {name} failed: {row['error']}")
            if "median" not in row:
                continue
            times = [1000 * value for value in row["seconds_per_step"]]
            ratio, mfu = row["times_faster"], row["model_flops_utilization"]
            memory = f"{row['peak_memory_mib']:,.0f} MiB" if row["peak_memory_mib"] else ""
            lines.append(
                f"| {label} | {name} | {1000 * row['median']:.1f} ({min(times):.1f}-{max(times):.1f}) "
                f"| {row['images_per_second']:,.4g} | {'' if ratio is None else f'**{ratio:.2f}**'} "
                f"| {row['flops_per_image'] / 1e9:.1f} | {row['flops_per_second'] / 1e12:.3g}"
                f"{'' if mfu is None else f' ({mfu:.1%})'} | {memory} "
                f"| {row['losses'][0]:.5f}, {row['last_loss']:.5f} |"
            )
            label = ""
    return "\n".join([*lines, "", *notes])


def plot(report: dict[str, Any], file: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = {case: {n: r for n, r in rows.items() if "median" in r} for case, rows in report["cases"].items()}
    cases = {case: rows for case, rows in cases.items() if rows}
    if not cases:
        return
    heights = [len(rows) + 1.5 for rows in cases.values()]
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(8, 0.34 * sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axis, (case, rows) in zip(axes[:, 0], cases.items(), strict=True):
        speeds = [row["images_per_second"] for row in rows.values()]
        batch_size = speeds[0] * next(iter(rows.values()))["median"]
        fastest = [batch_size / min(row["seconds_per_step"]) for row in rows.values()]
        slowest = [batch_size / max(row["seconds_per_step"]) for row in rows.values()]
        errors = [
            [max(0.0, speed - low) for speed, low in zip(speeds, slowest, strict=True)],
            [max(0.0, high - speed) for speed, high in zip(speeds, fastest, strict=True)],
        ]
        colors = ["#9a9a9a" if name == STOCK else "#1f6fb4" for name in rows]
        bars = axis.barh(list(rows), speeds, xerr=errors, color=colors, capsize=2)
        ratios = [row["times_faster"] for row in rows.values()]
        labels = [f"{v:,.4g}" + ("" if r is None else f", {r:.2f}x") for v, r in zip(speeds, ratios, strict=True)]
        axis.bar_label(bars, labels, padding=6, fontsize=8)
        axis.set_title(case, fontsize=9, loc="left")
        axis.set_xlim(0, 1.3 * max(speeds))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("images per second")
    figure.savefig(file, dpi=150)
    plt.close(figure)
