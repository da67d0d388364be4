"""Honest evaluation of any policy on any task file: Pass@1 with an interval, pass@k, by family.

In: a model (local) or an OpenAI-style endpoint (`--api`), a task file. Out: a table, and JSON with
`--json`. Local models go through the same agent loop as in training: same template, limits,
tools and context manager. A trajectory that is cut off, faulty or badly formatted counts as wrong.
To try an idea (another statistic), change `summarise`.

    python evaluate.py --model nano --tasks data/test.jsonl --samples 4 --json out.json
"""

import functools
import hashlib
import math
import os
import sqlite3
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as in train.py

import numpy as np
import torch
from tqdm import tqdm

from context import Chat, Trajectory
from data.task import load_tasks
from engine import keep_memory, load_policy
from reward import correct
from rollout import AgentLoop, RolloutArgs, play
from server_engine import EngineError, open_engine
from support.api_policy import api_rollout
from support.baselines import play_baseline
from support.benchmarks import SUFFIXES, gaia_correct, load_benchmark
from support.endpoint import side_by_side
from support.evaluation import (
    EvaluateArgs,
    check_args,
    format_table,
    make_trajectories,
    mean,
    open_tools,
    usage,
    write_files,
)
from support.flags import parse_flags
from support.judge import judge
from tools import signatures

# --------------------------------------------------------------------------------- statistics


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k of the n samples is right, c of which are: the unbiased
    estimator 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374).

    Raises:
        ValueError: k > n, or c outside 0..n.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap_interval(values: list[float], seed: int = 0, resamples: int = 2000) -> list[float]:
    """95% percentile interval of the mean over questions, as [low, high].

    Questions are resampled, not samples, because the samples of one question are not independent.
    Where all values are equal (none was solved, say) the Wilson interval is given instead.
    """
    values = np.asarray(values, dtype=float)
    if values.min() == values.max():
        return wilson_interval(float(values.mean()), values.size)
    picks = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    return np.percentile(values[picks].mean(axis=1), [2.5, 97.5]).tolist()


def wilson_interval(share: float, n: int) -> list[float]:
    """95% interval of a share seen in n trials (Wilson 1927), which holds at 0 and 1 as well."""
    z = 1.96
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (middle - half) / scale, (middle + half) / scale
    return [max(0.0, min(share, low)), min(1.0, max(share, high))]  # rounded, both hold the share


def score(trajectory: Trajectory) -> float:
    """1.0 if right: by comparing texts, or else by the judge's verdict if there was a judge."""
    task, answer = trajectory.task, trajectory.answer
    if trajectory.status != "answered":
        return 0.0
    if task.answer_type == "gaia":
        return gaia_correct(answer or "", task.answer)
    judged = trajectory.memory.get("verdict") == "yes"
    return max(correct(answer, task.answer, task.answer_type), float(judged))


def figures(groups: list[list[float]], seed: int) -> dict:
    """Pass@1 with its interval, from the scores of each task's samples."""
    shares = [mean(scores) for scores in groups]
    return {"pass@1": mean(shares), "pass@1_ci": bootstrap_interval(shares, seed), "n": len(shares)}


def summarise(trajectories: list[Trajectory], settings: dict, seed: int = 0) -> dict:
    """All figures of an evaluation, from finished trajectories (several a task)."""
    by_task: dict[str, list[Trajectory]] = {}
    for t in trajectories:
        by_task.setdefault(t.task.id, []).append(t)
    scores = [[score(t) for t in group] for group in by_task.values()]
    most = min(len(group) for group in scores)

    def at(k: int) -> float:
        return mean(pass_at_k(len(group), int(sum(group)), k) for group in scores)

    def by(name_of) -> dict[str, dict]:
        parts: dict[str, list[list[float]]] = {}
        for group, of_group in zip(by_task.values(), scores):
            parts.setdefault(str(name_of(group[0].task)), []).append(of_group)
        return {name: figures(parts[name], seed) for name in sorted(parts)}

    result = figures(scores, seed)
    result["pass@k"] = {str(k): at(k) for k in sorted({1, 2, 4, 8, 16, most}) if k <= most}
    result["avg@k"] = {str(most): mean(mean(group[:most]) for group in scores)}
    result |= {"samples": most} | usage(trajectories, [t for t in trajectories if score(t)])
    result["by_family"] = by(lambda task: task.family)
    result["by_hops"] = by(lambda task: f"{task.family} {task.hops}")
    result["by_template"] = by(lambda task: task.meta.get("template", "own"))
    result["by_pages"] = by(lambda task: task.meta.get("world", {}).get("style", "own"))
    return result | {"scores": dict(zip(by_task, map(mean, scores))), "settings": settings}


# ------------------------------------------------------------------------------------ policies


def open_policy(name: str, args: RolloutArgs):
    """(model, chat, engine) of a local policy."""
    model, tokenizer = load_policy(name, "cuda" if torch.cuda.is_available() else "cpu")
    chat = Chat(tokenizer, signatures())
    return model, chat, open_engine(model, chat, args)


def attempt(trajectories, args, rollout_args, toolbox, model, chat, engine) -> None:
    """Play the trajectories to their end, by what the flags name: a baseline, an API or a model."""
    if args.baseline != "none":
        for trajectory in tqdm(trajectories, args.baseline, disable=None):
            play_baseline(args.baseline, trajectory, toolbox, model, chat)
    elif args.api:
        server = {"url": args.api, "model": args.api_model, "toolbox": toolbox}
        one = functools.partial(api_rollout, **server, args=rollout_args)
        side_by_side(one, trajectories, 16, "evaluate")
    else:
        with tqdm(desc="evaluate", total=len(trajectories), mininterval=1, disable=None) as bar:
            play(AgentLoop(engine, chat, toolbox, rollout_args, lockstep=True), trajectories, bar)


def main():
    args, rollout_args = parse_flags((EvaluateArgs, RolloutArgs), __doc__)
    keep_memory()
    public = Path(args.tasks).suffix in SUFFIXES
    try:
        check_args(args, rollout_args)
        tasks = (load_benchmark if public else load_tasks)(args.tasks)[: args.limit or None]
        digest = hashlib.sha256(Path(args.tasks).read_bytes()).hexdigest()[:16]
        toolbox = open_tools(args, rollout_args, tasks, public)
        local = not args.api and args.baseline in ("none", "closed_book")
        model, chat, engine = open_policy(args.model, rollout_args) if local else 3 * [None]
    except (OSError, ValueError, sqlite3.Error) as error:
        sys.exit(f"evaluate.py: {error}")

    started, samples = time.time(), args.samples if args.baseline == "none" else 1
    trajectories = make_trajectories(tasks, samples, args.seed)
    try:
        attempt(trajectories, args, rollout_args, toolbox, model, chat, engine)
        if args.judge:
            ask_judge = functools.partial(judge, url=args.judge, model=args.judge_model)
            side_by_side(ask_judge, [t for t in trajectories if not score(t)], 8, "judge")
    except (KeyboardInterrupt, EngineError):  # no figures: what ends early is not a fair sample
        ended = [(t, score(t)) for t in trajectories if t.status != "running"]
        write_files(args, ended, chat, public)
        raise

    about = {"seconds": round(time.time() - started, 1), "torch": torch.__version__}
    settings = asdict(args) | asdict(rollout_args) | about | {"tasks_sha256": digest}
    result = summarise(trajectories, settings, args.seed)
    try:
        scored = list(zip(trajectories, map(score, trajectories)))
        write_files(args, scored, chat, public, result)
    except OSError as error:
        sys.exit(f"evaluate.py: {error}")
    finally:
        print(format_table(result))
    if args.api and result["status"] == {"tool_fault": len(trajectories)}:
        sys.exit(f"evaluate.py: the server at {args.api} failed each time: {trajectories[0].error}")


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, EngineError) as error:
        sys.exit(f"evaluate.py: {str(error) or 'stopped'}")
