"""What surrounds an evaluation: its flags, the tools they ask for, the file of trajectories."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from transformers.hf_argparser import HfArg

from context import Chat, Trajectory
from data.task import Task
from rollout import RolloutArgs
from support.baselines import Baseline, weaken
from support.checks import check_rollout_args
from support.endpoint import probe
from support.toolbox import Toolbox, open_toolbox
from tools import signatures


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
    trajectories: str = HfArg(default="", help="file for every trajectory, one JSON line each")
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
    for file in filter(None, (args.json, args.trajectories)):
        open(file, "a").close()
    if args.samples < 1 or args.limit < 0 or args.seed < 0:
        raise ValueError("--samples must be at least 1, --limit and --seed at least 0")
    if bool(args.judge) != bool(args.judge_model):
        raise ValueError("--judge URL and --judge_model NAME go together")
    if args.api and not args.api_model:
        raise ValueError("--api needs --api_model NAME")
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


def open_tools(args: EvaluateArgs, rollout_args: RolloutArgs, tasks: list[Task]) -> Toolbox:
    """The tools, as weak as the flags ask, with the worlds of these tasks open."""
    runs_python = args.baseline == "none" and "python" not in args.without
    if not runs_python:  # then no code runs, and none needs a sandbox
        rollout_args = replace(rollout_args, python="monty")
    toolbox = open_toolbox(rollout_args)
    weaken(toolbox, args.without, args.retriever, args.seed)
    if runs_python:
        print(f"python tool: {toolbox.isolation()}", file=sys.stderr)
    toolbox.prepare(tasks)
    return toolbox


def write_trajectories(
    path: str, scored: Iterable[tuple[Trajectory, float]], chat: Chat | None, public: bool
) -> None:
    """Write one line of JSON a trajectory.

    Args:
        scored: trajectories with their scores.
        chat: turns token ids into text; None where there are no ids.
        public: the tasks are a public benchmark's. Its authors ask that nobody writes its questions
            down in plain text, so of each question only the canary is kept.
    """
    with open(path, "w", encoding="utf-8") as file:
        for t, score in scored:
            text = "\n\n".join(chat.decode(segment.ids) for segment in t.segments) if chat else ""
            texts = {"question": t.task.question, "truth": t.task.answer, "text": text}
            line = {"id": t.task.id}
            line |= {"canary": t.task.meta.get("canary"), "text": ""} if public else texts
            line |= {"answer": t.answer, "score": score, "verdict": t.memory.get("verdict")}
            line |= {"status": t.status, "error": t.error, "turns": len(t.turns)}
            file.write(json.dumps(line) + "\n")


def format_table(result: dict) -> str:
    """The figures as a text table: overall, then by family, hops, template and kind of pages.

    A part shows what the tasks state: no row for tasks without a family, hops or a template.
    """
    lines = [f"{'':14s} {'tasks':>6s} {'Pass@1':>8s}   95% interval"]

    def add(name: str, row: dict) -> None:
        low, high = row["pass@1_ci"]
        lines.append(f"{name:14s} {row['n']:6d} {row['pass@1']:8.1%}   {low:.1%} to {high:.1%}")

    add("all", result)
    for part in ("by_family", "by_hops", "by_template", "by_pages"):
        rows = {n: row for n, row in result[part].items() if n != "own" and not n.endswith(" 0")}
        lines += [part.replace("_", " ") + ":"] if rows else []
        for name, row in rows.items():
            add(f"  {name}", row)
    at_k = ", ".join(f"pass@{k} {value:.1%}" for k, value in result["pass@k"].items())
    used = ", ".join(f"{name} {value:.2f}" for name, value in result["tool_calls"].items())
    lines.append(
        f"{at_k}; steps {result['steps_mean']:.2f}; URLs {result['urls_mean']:.1f}; format errors "
        f"{result['format_error_rate']:.1%}; calls a trajectory: {used or 'none'}"
    )
    for key, what in (
        ("n_error", "trajectories failed through no fault of the policy and count as wrong"),
        ("n_judged", "answers were judged"),
        ("n_judge_error", "answers got no readable verdict and count as wrong"),
    ):
        lines += [f"{result[key]} {what}"] if result[key] else []
    return "\n".join(lines)
