"""What surrounds an evaluation: its flags, the tools they ask for, the file of trajectories."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from transformers.hf_argparser import HfArg

from context import Chat, Trajectory
from data.task import Task
from rollout import EVALUATION, RolloutArgs, new_group
from support.baselines import Baseline, weaken
from support.checks import check_rollout_args
from support.endpoint import probe
from support.flags import try_files
from support.page import Pieces, pack, write_page
from support.toolbox import Toolbox
from support.trajectory_log import record_of, to_lines, without_texts
from tools import signatures

NO_TURN = "no trajectory has made a turn: --max_context is too small for the prompts"


@dataclass
class EvaluateArgs:
    model: str = HfArg(default="nano", help="nano, a checkpoint folder, a .gguf file or a hub name")
    tasks: str = HfArg(
        default="data/test.jsonl",
        help="task file; each line needs question and answer. Or a public benchmark's own .csv, "
        ".tsv or .parquet: BrowseComp, SimpleQA, FRAMES, xbench-DeepSearch, HLE, GAIA",
    )
    samples: int = HfArg(default=4, help="attempts at each task; pass@k needs at least k")
    limit: int = HfArg(default=0, help="use only the first so many tasks (0: all)")
    json: str = HfArg(default="", help="file to write the figures to")
    trajectories: str = HfArg(
        default="",
        help="file for every trajectory, one JSON line each; Ctrl-C leaves those that have ended",
    )
    report: str = HfArg(default="", help="HTML page with the figures and every trajectory")
    seed: int = HfArg(default=0, help="decides the sampling and the bootstrap")
    api: str = HfArg(default="", help="evaluate a served model: base URL, http://127.0.0.1:8000/v1")
    api_model: str = HfArg(default="", help="name of the model behind --api")
    judge: str = HfArg(
        default="",
        help="base URL of an OpenAI-style endpoint that judges answers which are not equal to the "
        "truth as texts",
    )
    judge_model: str = HfArg(default="", help="name of the model behind --judge")
    without: list[str] = HfArg(
        default_factory=list,
        help="tools to take away: each call of one is answered with an error, which is no fault of "
        "format",
    )
    retriever: Literal["bm25", "random", "empty"] = HfArg(
        default="bm25",
        help="random: search shows pages drawn at random from the index; empty: it finds nothing",
    )
    baseline: Baseline = HfArg(
        default="none",
        help="instead of an agent: closed_book (the model must answer at once), top_snippet (copy "
        "the top hit's first fact), snippet_reader (the top hit's fact nearest to the question)",
    )


def check_args(args: EvaluateArgs, rollout_args: RolloutArgs) -> None:
    """Raise a ValueError or OSError, one line, for flags that cannot work. Files are tried, and
    servers asked, before the evaluation rather than after it."""
    check_rollout_args(rollout_args)
    try_files(args.json, args.trajectories, args.report)
    if args.samples < 1 or args.limit < 0 or args.seed < 0:
        raise ValueError("--samples must be at least 1, --limit and --seed at least 0")
    if bool(args.judge) != bool(args.judge_model):
        raise ValueError("--judge URL and --judge_model NAME go together")
    if args.api and not args.api_model:
        raise ValueError("--api needs --api_model NAME")
    if args.api and args.baseline != "none":
        raise ValueError(f"--baseline {args.baseline} does not ask a served model: leave out --api")
    if args.api and rollout_args.context != "none":
        raise ValueError(
            f"--context {rollout_args.context} edits token ids, which --api does not have: "
            "a served model sees the whole transcript"
        )
    there = [signature.split("(")[0] for signature in signatures()]
    if unknown := sorted(set(args.without) - set(there)):
        raise ValueError(f"--without {' '.join(unknown)}: there are {', '.join(there)}")
    if args.retriever == "random" and rollout_args.search != "embedded":
        raise ValueError("--retriever random draws from the embedded index alone")
    for url in filter(None, (args.api, args.judge)):
        probe(url)


def open_tools(args: EvaluateArgs, rollout_args: RolloutArgs, tasks: list, public: bool) -> Toolbox:
    """The tools, as weak as the flags ask, with the worlds of these tasks open. Queries about
    public benchmarks are not kept on disk: they hold the questions.
    """
    runs_python = args.baseline == "none" and "python" not in args.without
    if not runs_python:  # then no code runs, and none needs a sandbox
        rollout_args = replace(rollout_args, python="monty")
    toolbox = Toolbox(rollout_args, keeps=not public)
    weaken(toolbox, args.without, args.retriever, args.seed)
    if runs_python:
        print(f"python tool: {toolbox.isolation()}", file=sys.stderr)
    toolbox.prepare(tasks)
    return toolbox


def make_trajectories(tasks: list[Task], samples: int, seed: int) -> list[Trajectory]:
    """Fresh attempts at all tasks, task by task."""
    groups = [new_group(task, n, samples, seed, stream=EVALUATION) for n, task in enumerate(tasks)]
    return [trajectory for group in groups for trajectory in group.trajectories]


def mean(values) -> float:
    return float(np.mean(list(values)))


def usage(trajectories: list[Trajectory], hits: list[Trajectory]) -> dict:
    """How the policy worked: turns, addresses seen, calls, and how its trajectories ended.

    Args:
        hits: those of the trajectories that were right.
    """
    verdicts = Counter(t.memory.get("verdict") for t in trajectories)
    calls = Counter(call["name"] for t in trajectories for turn in t.turns for call in turn.calls)
    notes = [[n for n in t.memory.get("notes_turns", []) if n < len(t.turns)] for t in trajectories]
    status = Counter(t.status for t in trajectories)
    return {
        "n_error": status["tool_fault"],  # the environment or the server failed; counts as wrong
        "n_judged": verdicts["yes"] + verdicts["no"],
        "n_judge_error": verdicts["unparsed"],
        "steps_mean": mean(len(t.turns) for t in trajectories),
        "steps_mean_correct": mean(len(t.turns) for t in hits) if hits else None,
        "notes_mean": mean(map(len, notes)),
        "urls_mean": mean(len(t.urls) for t in trajectories),
        "format_error_rate": status["format_error"] / len(trajectories),
        "status": dict(status),
        "format_errors": dict(Counter(t.error for t in trajectories if t.status == "format_error")),
        "tool_calls": {name: count / len(trajectories) for name, count in sorted(calls.items())},
    }


def write_files(
    args: EvaluateArgs,
    scored: list,
    chat: Chat | None,
    public: bool,
    result: dict | None = None,
) -> None:
    """Write the files that the flags name.

    Args:
        scored: (trajectory, score) of each.
        chat: turns token ids into text; None where there are no ids.
        public: the tasks are a public benchmark's. Its authors ask that nobody writes its questions
            down in plain text, so of each question only the canary is kept.
        result: the figures; None if the evaluation ended early, and then only --trajectories is
            written.
    """
    if args.json and result:
        Path(args.json).write_text(json.dumps(result, indent=1))
    records = []
    for t, score in scored if args.trajectories or args.report else []:
        place = {"step": 0, "group": t.key[2], "index": t.key[3]}
        record = place | record_of(t, chat) | {"score": score, "verdict": t.memory.get("verdict")}
        records.append(without_texts(record, t.task.meta.get("canary")) if public else record)
    if args.trajectories:
        Path(args.trajectories).write_text("".join(to_lines(records)), encoding="utf-8")
    if args.report and result:
        write_evaluation(args, result, records, chat)


def write_evaluation(
    args: EvaluateArgs, result: dict, records: list[dict], chat: Chat | None
) -> None:
    """Write the page of an evaluation: its figures and its trajectories."""
    name = args.api_model or (args.model if args.baseline == "none" else args.baseline)
    rows = []
    for title, row in table_rows(result):
        cells = 4 * [""]
        if row:
            cells = [str(row["n"]), *(f"{x:.1%}" for x in (row["pass@1"], *row["pass@1_ci"]))]
        rows.append([title, *cells])
    table = {
        "title": "Pass@1",
        "head": ["", "tasks", "Pass@1", "95% interval from", "to"],
        "rows": [{"cells": row} for row in rows],
        "note": "; ".join(notes_of(result)),
    }
    pieces = Pieces(chat.tokenizer.backend_tokenizer if chat else None)
    run = {"name": name, "packed": {0: pack(records, pieces)}, "pieces": pieces.texts}
    title = f"{name} on {args.tasks}"
    write_page(args.report, {"title": title, "runs": [run], "tables": [table], "panels": []})


def table_rows(result: dict) -> list[tuple[str, dict | None]]:
    """(title, figures) of all tasks, then by family, hops, template and kind of pages; None in a
    row that heads a part.

    A part shows what the tasks state: no row for tasks without a family, hops or a template.
    """
    rows = [("all", result)]
    for part in ("by_family", "by_hops", "by_template", "by_pages"):
        of_part = {name: row for name, row in result[part].items() if name != "own"}
        if part == "by_hops":
            of_part = {name: row for name, row in of_part.items() if not name.endswith(" 0")}
        rows += [(part.replace("_", " ") + ":", None)] if of_part else []
        rows += [(f"  {name}", row) for name, row in of_part.items()]
    return rows


def notes_of(result: dict) -> list[str]:
    """What stands below the table."""
    at_k = ", ".join(f"pass@{k} {value:.1%}" for k, value in result["pass@k"].items())
    used = ", ".join(f"{name} {value:.2f}" for name, value in result["tool_calls"].items())
    lines = [
        f"{at_k}; turns {result['steps_mean']:.2f}; URLs {result['urls_mean']:.1f}; format errors "
        f"{result['format_error_rate']:.1%}; calls a trajectory: {used or 'none'}"
    ]
    for key, what in (
        ("n_error", "trajectories failed through no fault of the policy and count as wrong"),
        ("n_judged", "answers were judged"),
        ("n_judge_error", "answers got no readable verdict and count as wrong"),
    ):
        lines += [f"{result[key]} {what}"] if result[key] else []
    if result["status"].get("over_context") and not result["steps_mean"]:
        lines.append(f"warning: {NO_TURN}")
    return lines


def format_table(result: dict) -> str:
    """The figures as a text table."""
    lines = [f"{'':14s} {'tasks':>6s} {'Pass@1':>8s}   95% interval"]
    for title, row in table_rows(result):
        if row is None:
            lines.append(title)
            continue
        low, high = row["pass@1_ci"]
        lines.append(f"{title:14s} {row['n']:6d} {row['pass@1']:8.1%}   {low:.1%} to {high:.1%}")
    return "\n".join([*lines, *notes_of(result)])
