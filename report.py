"""Look at runs: one HTML page with curves, what differs between them, and every trajectory.

In: folders of runs that train.py wrote. Out: one file that works without a network; the page itself
is support/report.html. Runs are compared with the first one. On tasks that both have played, the
difference is paired: the interval resamples the differences task by task.
To count another behaviour, change support/behaviour.py.

    python report.py runs/run-1 runs/run-2 --open
"""

import argparse
import itertools
import json
import math
import sys
import webbrowser
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from evaluate import bootstrap_interval, wilson_interval
from support.behaviour import behaviour_of
from support.page import Pieces, pack, write_page
from support.run_folder import read_lines, whole_lines

# Starts of the names of shares.
PERCENT = ("pass_rate", "share", "kept_negatives", "zero_variance", "all_right", "all_wrong")
# In config.json, and no reason for a difference.
NOT_COMPARED = {"out", "resume", "log_with", "processes", "threads", "packages"}
TIMES = ("rollout_s", "train_s", "tokens_per_s")
LEARNING = {  # key in metrics.jsonl -> title
    "pass_rate": "Pass@1 on training tasks",
    "reward": "mean reward",
    "turns": "turns a trajectory",
    "entropy": "entropy, nats a token",
}

# -------------------------------------------------------------------------------- what a run holds


def read_trajectories(path: Path, pieces: Pieces) -> tuple[dict, dict]:
    """Two dicts by update: the packed trajectories for the page, and (task, behaviour) of each.

    The file may be large, so one update at a time is in memory.
    """
    packed, behaviours = {}, {}
    records = (record for _, record in whole_lines(path))
    records = (r for r in records if isinstance(r.get("turns"), list))  # else an older run's
    for step, group in itertools.groupby(records, key=lambda record: record["step"]):
        group = sorted(group, key=lambda record: (record["group"], record["index"]))
        behaviours[step] = [(record["id"], behaviour_of(record)) for record in group]
        packed[step] = pack(group, pieces)
    return packed, behaviours


def read_run(folder: Path) -> dict:
    """Everything that the page needs of a run.

    Raises:
        FileNotFoundError, ValueError: there is no run in the folder, or a damaged one.
    """
    metrics = read_lines(folder / "metrics.jsonl")
    if not metrics:
        raise FileNotFoundError(f"{folder}: no run there, no metrics.jsonl with an update")
    parts = {name for m in metrics for name in m.get("reward_parts", {})}
    for m in metrics:  # a part that no trajectory of an update had is 0
        m["reward_parts"] = dict.fromkeys(parts, 0.0) | m.get("reward_parts", {})
    tokenizer = folder / "checkpoint" / "tokenizer.json"
    pieces = Pieces(Tokenizer.from_file(str(tokenizer)) if tokenizer.exists() else None)
    packed, behaviours = read_trajectories(folder / "trajectories.jsonl", pieces)
    config = folder / "config.json"
    return {
        "name": folder.resolve().name,
        "config": json.loads(config.read_text()) if config.exists() else {},
        "metrics": metrics,
        "evaluations": read_lines(folder / "evaluations.jsonl"),
        "packed": packed,
        "behaviours": behaviours,
        "pieces": pieces.texts,
    }


# -------------------------------------------------------------------------------------- statistics


def difference(
    a: dict[str, float], b: dict[str, float], is_share: bool
) -> tuple[float, float, float, int]:
    """Mean of b minus mean of a with its 95% interval, and the tasks that it is paired on (0: the
    two have too few tasks in common, and are taken as independent).

    Args:
        a, b: task -> value.
        is_share: the values are shares. Of them something can be said where all are equal: no
            difference seen does not prove that there is none. Else the interval is nan then.
    """
    shared = [task for task in a if task in b]
    is_paired = 2 * len(shared) > max(len(a), len(b))
    ours = np.array([a[task] for task in (shared if is_paired else a)])
    theirs = np.array([b[task] for task in (shared if is_paired else b)])
    middle = float(theirs.mean() - ours.mean())
    if is_paired and np.ptp(theirs - ours) > 0:
        return middle, *bootstrap_interval(theirs - ours), len(shared)
    if not is_paired and np.ptp(ours) + np.ptp(theirs) > 0:
        rng = np.random.default_rng(0)
        means = [
            values[rng.integers(0, len(values), (2000, len(values)))].mean(axis=1)
            for values in (ours, theirs)
        ]
        low, high = np.percentile(means[1] - means[0], [2.5, 97.5])
        return middle, low, high, 0
    rest = wilson_interval(0.0, min(len(ours), len(theirs)))[1] if is_share else math.nan
    return middle, middle - rest, middle + rest, len(shared) if is_paired else 0


def by_task(behaviours: dict, steps: list[int]) -> dict[str, dict[str, float]]:
    """Behaviour -> task -> its mean over the attempts at it, in these updates."""
    groups: dict[str, list[dict]] = {}
    for step in steps:
        for task, numbers in behaviours[step]:
            groups.setdefault(task, []).append(numbers)
    names = dict.fromkeys(n for group in groups.values() for numbers in group for n in numbers)
    return {
        name: {
            task: sum(numbers.get(name, 0.0) for numbers in group) / len(group)
            for task, group in groups.items()
        }
        for name in names
    }


# ------------------------------------------------------------------------------------------ tables


def shown(name: str, value: float, sign: str = "") -> str:
    """A number for people; a difference has its sign."""
    is_share = name.startswith(PERCENT)
    text = f"{100 * value:{sign}.1f}%" if is_share else f"{value:{sign}.2f}"
    return text.replace("-", "\u2212")


def shown_difference(name: str, found: tuple) -> str:
    middle, low, high, _ = found
    if math.isnan(low):
        return shown(name, middle, "+").replace("%", " points")
    words = f"{shown(name, middle, '+')} ({shown(name, low, '+')} to {shown(name, high, '+')})"
    # +3.0% (+1.0% to +5.0%) becomes +3.0 points (+1.0 to +5.0).
    return words.replace("%", " points", 1).replace("%", "") if "%" in words else words


def is_clear(found: tuple) -> bool:
    return found[1] > 0 or found[2] < 0


def held_out(run: dict) -> list[dict]:
    """The evaluations of the split that was asked last: test, where a run has ended."""
    found = run["evaluations"]
    last = max(found, key=lambda e: (e["step"], e["split"]), default={"split": ""})
    return [e for e in found if e["split"] == last["split"]]


def held_out_table(runs: list[dict]) -> dict:
    """Last held-out Pass@1 of each run, its gain since the start, and against the first run."""
    rows = []
    for run in runs:
        found = held_out(run)
        if not found:
            continue
        last = found[-1]
        first = [e for e in runs[0]["evaluations"] if e["split"] == last["split"]]
        cells = [run["name"], f"{last['split']}, after {last['step']} updates", str(last["n"])]
        value, *interval = [shown("share", x) for x in (last["pass@1"], *last["pass@1_ci"])]
        cells += [value, " to ".join(interval)]
        clear = []
        for earlier, same in ((found[0], last is found[0]), (first and first[-1], run is runs[0])):
            if same or not earlier or not ("scores" in earlier and "scores" in last):
                cells.append("")
                continue
            compared = difference(earlier["scores"], last["scores"], is_share=True)
            clear += [len(cells)] if is_clear(compared) else []
            paired = ", paired" if compared[3] else ", on other tasks"
            cells.append(shown_difference("share", compared) + paired)
        rows.append({"cells": cells, "clear": clear})
    head = ["run", "held out", "tasks", "Pass@1", "95% interval", "since its first evaluation"]
    table = {"title": "Held-out Pass@1", "head": [*head, f"against {runs[0]['name']}"]}
    if len(runs) == 1:
        table["head"].pop()
        rows = [row | {"cells": row["cells"][:-1]} for row in rows]
    return table | {
        "rows": rows,
        "note": "Bold: the 95% interval of the difference does not hold 0.",
    }


def flag_table(runs: list[dict]) -> dict:
    names = dict.fromkeys(name for run in runs for name in run["config"])
    rows = []
    for name in names:
        values = [json.dumps(run["config"].get(name), ensure_ascii=False) for run in runs]
        if len(set(values)) > 1 and name not in NOT_COMPARED:
            rows.append({"cells": [name if name == "commit" else f"--{name}", *values]})
    head = ["flag", *(run["name"] for run in runs)]
    return {"title": "Flags that differ", "head": head, "rows": rows, "note": ""}


def behaviour_table(runs: list[dict]) -> dict | None:
    """What the agents did: the last updates of the runs beside each other, or of one run its first
    updates beside its last. What differs most clearly comes first.
    """
    runs = [run for run in runs if run["behaviours"]]
    if not runs:
        return None
    common = set.intersection(*(set(run["behaviours"]) for run in runs))
    columns = []
    for run in runs:
        steps = sorted(common or run["behaviours"])
        some = max(1, len(steps) // 4)
        if len(runs) == 1 and len(steps) > 1:
            columns.append((f"updates {steps[0]} to {steps[some - 1]}", run, steps[:some]))
        name = f"{run['name']}, " if len(runs) > 1 else ""
        columns.append((f"{name}updates {steps[-some]} to {steps[-1]}", run, steps[-some:]))
    values = [by_task(run["behaviours"], steps) for _, run, steps in columns]
    rows = []
    for name in dict.fromkeys(n for each in values for n in each):
        tasks = [each.get(name) or dict.fromkeys(each["turns"], 0.0) for each in values]
        cells = [name, *(shown(name, float(np.mean(list(v.values())))) for v in tasks)]
        found = [difference(tasks[0], other, name.startswith(PERCENT)) for other in tasks[1:]]
        cells += [shown_difference(name, each) for each in found]
        clear = [len(cells) - len(found) + k for k, each in enumerate(found) if is_clear(each)]
        clarity = max((abs(f[0]) / (f[2] - f[1] + 1e-9) for f in found if is_clear(f)), default=0)
        rows.append({"cells": cells, "clear": clear and [0, *clear], "clarity": clarity})
    rows.sort(key=lambda row: -row["clarity"])
    head = ["a trajectory", *(title for title, _, _ in columns)]
    head += ["difference"] if len(columns) == 2 else [f"{r['name']} less first" for r in runs[1:]]
    note = (
        "Training tasks. Bold: the 95% interval does not hold 0; the clearest difference is first."
    )
    return {"title": "What the agents did", "head": head, "rows": rows, "note": note}


# ------------------------------------------------------------------------------------------ curves


def panel(part: str, name: str, title: str, lines: list[dict]) -> list[dict]:
    """A panel of the page, or none where nothing but zeros would be seen."""
    lines = [line for line in lines if line["points"]]
    if not any(point[1] for line in lines for point in line["points"]):
        return []
    return [{"part": part, "title": title, "percent": name.startswith(PERCENT), "lines": lines}]


def curves_of(runs: list[dict], points_of, label: str = "") -> list[dict]:
    """A line a run, through points_of(run): [update, value] each, or [update, value, low, high]."""
    return [{"run": n, "label": label, "points": points_of(run)} for n, run in enumerate(runs)]


def metric(*keys: str):
    """Points of a number in metrics.jsonl, without updates that do not have it."""

    def points_of(run: dict) -> list[list]:
        points = []
        for metrics in run["metrics"]:
            value = metrics
            for key in keys:
                value = value.get(key, {})
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            points += [[metrics["step"], value]] if is_number else []
        return points

    return points_of


def passed(split: str):
    """Points of Pass@1 on a held-out split, with their intervals."""
    return lambda run: [
        [e["step"], e["pass@1"], *e["pass@1_ci"]] for e in run["evaluations"] if e["split"] == split
    ]


def behaved(name: str):
    """Points of the mean of a behaviour."""
    return lambda run: [
        [step, sum(numbers.get(name, 0.0) for _, numbers in group) / len(group)]
        for step, group in run["behaviours"].items()
    ]


def panels_of(runs: list[dict]) -> list[dict]:
    """All curves, in the order in which the page shows them."""
    metrics = [m for run in runs for m in run["metrics"]]
    held_out_lines = curves_of(runs, passed("dev"), "dev") + curves_of(runs, passed("test"), "test")
    panels = panel("Learning", "share", "held-out Pass@1", held_out_lines)
    for key, title in LEARNING.items():
        panels += panel("Learning", key, title, curves_of(runs, metric(key)))
    for part, key in (
        ("By family", "pass_rate_by_family"),
        ("Parts of the reward", "reward_parts"),
    ):
        for name in sorted({name for m in metrics for name in m.get(key, {})}):
            panels += panel(part, key, name, curves_of(runs, metric(key, name)))
    numbers = [numbers for r in runs for b in r["behaviours"].values() for _, numbers in b]
    for name in sorted({name for each in numbers for name in each} - {"turns", "share correct"}):
        panels += panel("Behaviour, a trajectory", name, name, curves_of(runs, behaved(name)))
    keys = {key for m in metrics for key, value in m.items() if isinstance(value, (int, float))}
    for key in [*sorted(keys - {"step", *LEARNING, *TIMES}), *TIMES]:
        name = "share" if key.endswith("_share") else key
        panels += panel(
            "Health and time", name, key.replace("_", " "), curves_of(runs, metric(key))
        )
    return panels


# ---------------------------------------------------------------------------------------- the page


def write_report(folders: list[Path], out: Path) -> None:
    """Write the page of these runs.

    Raises:
        OSError, ValueError: a folder without a run, or a file that cannot be read or written.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run["name"] for run in runs]
    for run, folder in zip(runs, folders):
        run["name"] = str(folder) if names.count(run["name"]) > 1 else run["name"]
    tables = [held_out_table(runs), behaviour_table(runs), flag_table(runs)]
    kept = ("name", "packed", "pieces")
    write_page(
        out,
        {
            "title": " and ".join(run["name"] for run in runs),
            "runs": [{key: run[key] for key in kept} for run in runs],
            "tables": [table for table in tables if table and table["rows"]],
            "panels": panels_of(runs),
        },
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; the first is compared")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page")
    parser.add_argument("--open", action="store_true", help="show it in a browser")
    args = parser.parse_args()
    try:
        write_report(args.runs, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
    except Exception as error:  # a log may hold anything
        folders = ", ".join(map(str, args.runs))
        sys.exit(f"report.py: damaged logs in {folders} ({type(error).__name__}: {error})")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    if args.open:
        webbrowser.open(args.out.resolve().as_uri())


if __name__ == "__main__":
    main()
