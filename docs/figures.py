"""The pictures of docs/results.md, drawn from committed figures alone.

In: from docs/results/NAME/ the files metrics.jsonl and evaluations.jsonl (train.py wrote them) and
test.json (evaluate.py wrote it), and bench/ablations.json. Out: learning.png, ablations.png and
deep.png in docs/.
To draw another figure, write a function `draw_...` and call it at the end.

    python docs/figures.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

DOCS = Path(__file__).resolve().parent


def lines_of(run: str, name: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (DOCS / "results" / run / f"{name}.jsonl").read_text().splitlines()
    ]


def test_of(run: str) -> dict:
    return json.loads((DOCS / "results" / run / "test.json").read_text())


def runs(prefix: str) -> list[str]:
    return sorted(
        folder.name for folder in (DOCS / "results").iterdir() if folder.name.startswith(prefix)
    )


def draw_learning() -> None:
    """Held-out Pass@1, turns and entropy of the default run: a thin line a seed, and the mean."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    metrics = [lines_of(run, "metrics") for run in runs("seed")]
    steps = [m["step"] for m in metrics[0]]
    for axis, key, title in (
        (axes[0], "pass_rate", "Pass@1"),
        (axes[1], "turns", "turns a trajectory"),
        (axes[2], "entropy", "entropy, nats a token"),
    ):
        curves = np.array([[m[key] for m in run] for run in metrics])  # (seeds, steps)
        axis.plot(steps, curves.T, color="tab:blue", alpha=0.25, linewidth=1)
        axis.plot(
            steps,
            curves.mean(0),
            color="tab:blue",
            label=f"training tasks, mean of {len(curves)} seeds",
        )
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    for split, colour, offset in (("dev", "tab:orange", 0), ("test", "tab:red", 0.4)):
        points: dict[int, list[float]] = {}
        for run in runs("seed"):
            for evaluation in lines_of(run, "evaluations"):
                if evaluation["split"] == split:
                    points.setdefault(evaluation["step"], []).append(evaluation["pass@1"])
        x = sorted(points)
        y = [float(np.mean(points[step])) for step in x]
        spread = [
            [v - min(points[s]) for s, v in zip(x, y)],
            [max(points[s]) - v for s, v in zip(x, y)],
        ]
        axes[0].errorbar(
            [s + offset for s in x],
            y,
            yerr=spread,
            fmt="o-" if split == "dev" else "s",
            color=colour,
            capsize=3,
            label=f"held-out {split} tasks, lowest to highest seed",
        )
    axes[0].set_ylim(0, 1)
    axes[0].legend(fontsize=7, loc="lower right")
    figure.savefig(DOCS / "learning.png", dpi=110)
    plt.close(figure)


def draw_ablations() -> None:
    """Held-out Pass@1 with one flag changed: a dot is a seed, a bar their mean."""
    tests = json.loads((DOCS / "results" / "bench" / "ablations.json").read_text())
    rows: dict[str, list[float]] = {}
    for name, test in tests.items():
        rows.setdefault(name.rpartition("-")[0], []).append(test["pass@1"])
    order = sorted(rows, key=lambda row: (row != "default", np.mean(rows[row])))
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.32 * len(order)), layout="constrained")
    for y, row in enumerate(order):
        colour = "tab:orange" if row == "default" else "tab:blue"
        axis.plot(rows[row], [y] * len(rows[row]), "o", color=colour, markersize=5, alpha=0.7)
        axis.plot([np.mean(rows[row])], [y], "|", color="black", markersize=14)
    axis.axvline(np.mean(rows["default"]), color="tab:orange", linewidth=1, alpha=0.5)
    axis.set_yticks(range(len(order)), order)
    axis.set_ylim(-0.6, len(order) - 0.4)
    axis.set_title("held-out Pass@1 with one flag changed: seeds and their mean", fontsize=10)
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(DOCS / "ablations.png", dpi=110)
    plt.close(figure)


def draw_deep() -> None:
    """Context managers on walks of thirty pages.

    Training Pass@1 and turns over the steps, a line a seed, and held-out Pass@1 before and after
    training.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    kinds = {  # of a run's folder -> colour, and what the policy sees
        "none": ("tab:gray", "none\n1,024 tokens"),
        "elide-1024": ("tab:olive", "elide\n1,024"),
        "elide": ("tab:orange", "elide\n2,560"),
        "summarize": ("tab:blue", "summarize\n1,024"),
    }
    for number, (kind, (colour, title)) in enumerate(kinds.items()):
        trained = runs(f"deep-{kind}-seed")
        for run in trained:
            metrics = lines_of(run, "metrics")
            label = title.replace("\n", ", ") if run == trained[0] else None
            for axis, key in zip(axes, ("pass_rate", "turns")):
                axis.plot(
                    [m["step"] for m in metrics],
                    [m[key] for m in metrics],
                    color=colour,
                    linewidth=1,
                    label=label,
                )
        base = json.loads((DOCS / "results" / "deep-base" / f"{kind}.json").read_text())
        for k, test in enumerate([base, *map(test_of, trained)]):
            low, high = test["pass@1_ci"]
            x, alpha = number + 0.2 * k, 0.9 if k else 0.35
            axes[2].bar(x, test["pass@1"], 0.18, color=colour, alpha=alpha)
            error = [[test["pass@1"] - low], [high - test["pass@1"]]]
            axes[2].errorbar(x, test["pass@1"], error, color="black", capsize=2, linewidth=1)
    axes[2].set_xticks([n + 0.3 for n in range(4)], [title for _, title in kinds.values()])
    for axis, title in zip(
        axes,
        (
            "Pass@1 on training tasks",
            "turns a trajectory",
            "held-out Pass@1: base (pale), and each seed",
        ),
    ):
        axis.set_title(title, fontsize=11)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_xlabel("step")
    axes[1].set_xlabel("step")
    axes[0].legend(fontsize=7, loc="upper left")
    figure.savefig(DOCS / "deep.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw_learning()
    draw_ablations()
    draw_deep()
