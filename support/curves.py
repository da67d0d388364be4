"""curves.png: how a run learns, drawn from its metrics.jsonl and evaluations.jsonl.

To draw something else, change PANELS or `draw_curves`.
"""

import os
from pathlib import Path

from support.run_folder import read_lines

PANELS = {  # key in metrics.jsonl -> title
    "turns": "turns a trajectory",
    "entropy": "entropy of the policy, nats a token",
    "reward": "mean reward, and its parts",
}
STYLES = {"dev": ("o-", "C0"), "test": ("s--", "C3")}


def draw_held_out(axis, evaluations: list[dict]) -> None:
    """Pass@1 of the held-out splits, with 95% intervals."""
    for split, (style, color) in STYLES.items():
        points = [e for e in evaluations if e["split"] == split]
        if points:
            values = [e["pass@1"] for e in points]
            below = [e["pass@1"] - e["pass@1_ci"][0] for e in points]
            above = [e["pass@1_ci"][1] - e["pass@1"] for e in points]
            axis.errorbar(
                [e["step"] for e in points],
                values,
                yerr=[below, above],
                fmt=style,
                color=color,
                capsize=4,
                linewidth=2,
                label=f"held-out {split} tasks, 95% interval",
            )


def draw_curves(out: Path) -> None:
    """Write curves.png into a run folder; it appears whole or not at all."""
    # Imported here, since it takes a third of a second, and workers and other ranks draw nothing.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    metrics = read_lines(out / "metrics.jsonl")
    updates = [m["step"] for m in metrics]
    marker = "o" if len(updates) == 1 else None
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(11, 7))
    # By hand: measuring the texts for it would take as long as drawing them.
    figure.subplots_adjust(0.06, 0.07, 0.98, 0.95, wspace=0.16, hspace=0.34)
    first = axes[0, 0]
    first.set_title("Pass@1")
    passed = [m["pass_rate"] for m in metrics]
    first.plot(updates, passed, color="0.6", marker=marker, label="training tasks")
    draw_held_out(first, read_lines(out / "evaluations.jsonl"))
    first.set_ylim(0, 1)
    first.yaxis.set_major_formatter(PercentFormatter(1.0))
    first.legend(fontsize=10, frameon=False, loc="lower right")
    for axis, (key, title) in zip(axes.flat[1:], PANELS.items()):
        axis.plot(updates, [m[key] for m in metrics], linewidth=2, marker=marker)
        axis.set_title(title)
    parts = sorted({name for m in metrics for name in m["reward_parts"]})
    for part in parts:
        values = [m["reward_parts"].get(part, 0.0) for m in metrics]
        label = part.replace("$", r"\$")  # else matplotlib reads mathematics
        axes[1, 1].plot(updates, values, linewidth=1, marker=marker, label=label)
    if parts:
        axes[1, 1].legend(fontsize=10, frameon=False, loc="center right")
    for axis in axes.flat:
        axis.set_xlabel("update")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    figure.savefig(out / "curves.png.new", dpi=100, format="png")
    os.replace(out / "curves.png.new", out / "curves.png")
    plt.close(figure)
