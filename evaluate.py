"""Honest evaluation of any policy on any task file: Pass@1 with an interval, unbiased pass@k, by family, and how it worked.

In: a model (local) or an OpenAI-style endpoint (`--api`), a task file. Out: a table, and JSON with `--json`. Local models
go through the same `rollout` as in training: same template, limits, tools and context manager. A trajectory that is cut off,
faulty or badly formatted counts as wrong.
To try an idea (another statistic), change `summarise`.

    python evaluate.py --model nano --tasks data/test.jsonl --samples 4 --json out.json
"""

import json
import math
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import requests
import torch
from tqdm import tqdm

from context import SYSTEM_PROMPT, Chat
from data.tasks import Task, load_tasks
from reward import FORMAT_FAILURES, correct
from rollout import Engine, RolloutArgs, Trajectory, Turn, keep_memory, load_policy, parse_flags, rollout, take_results, trajectory_key
from tools import SIGNATURES, FormatError, Toolbox, parse_action, run_calls


@dataclass
class EvaluateArgs:
    model: str = field(default="nano", metadata={"help": "nano, a checkpoint folder, a .gguf file or a hub name"})
    tasks: str = field(default="data/test.jsonl", metadata={"help": "task file; each line needs question and answer"})
    samples: int = field(default=4, metadata={"help": "attempts at each task; pass@k needs at least k"})
    limit: int = field(default=0, metadata={"help": "use only the first so many tasks (0: all)"})
    json: str = field(default="", metadata={"help": "file to write the figures to"})
    trajectories: str = field(default="", metadata={"help": "file to write every trajectory to, one JSON line each"})
    seed: int = field(default=0, metadata={"help": "decides the sampling and the bootstrap"})
    api: str = field(default="", metadata={"help": "evaluate a served model instead: base URL such as http://127.0.0.1:8000/v1"})
    api_model: str = field(default="", metadata={"help": "name of the model behind --api"})
    baseline: str = field(default="", metadata={"help": "instead of an agent: closed_book (the model must answer at once), top_snippet (copy the top hit's first fact), snippet_reader (the top hit's sentence nearest to the question)"})


# ---------------------------------------------------------------------------------------------------------- statistics

def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k of the n samples is right, c of which are: the unbiased estimator
    1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374).

    Raises:
        ValueError: k > n, or c outside 0..n.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap_interval(values: list[float], seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile interval of the mean over questions: questions are resampled, not samples, since samples of one
    question are not independent. With all values equal (none solved, say) the Wilson interval is given instead."""
    values = np.asarray(values, dtype=float)
    if values.size == 0:
        return 0.0, 1.0
    if values.min() == values.max():
        return wilson_interval(float(values.mean()), values.size)
    picks = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95% interval of a share observed in n trials (Wilson 1927); sound at 0 and 1, where the bootstrap is not."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def summarise(trajectories: list[Trajectory], settings: dict, seed: int = 0) -> dict:
    """All figures of an evaluation, from finished trajectories (several a task)."""
    by_task: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        by_task.setdefault(trajectory.task.id, []).append(trajectory)

    def scores(group: list[Trajectory]) -> list[float]:
        return [correct(t.answer, t.task.answer, t.task.answer_type) if t.status == "answered" else 0.0 for t in group]

    def figures(groups: list[list[Trajectory]]) -> dict:
        shares = [float(np.mean(scores(group))) for group in groups]
        low, high = bootstrap_interval(shares, seed)
        return {"pass@1": float(np.mean(shares)), "pass@1_ci": [low, high], "n": len(groups)}

    groups = list(by_task.values())
    n = min(len(group) for group in groups)
    hits = [t for group in groups for t, score in zip(group, scores(group)) if score]
    calls = Counter(call["name"] for t in trajectories for turn in t.turns for call in turn.calls)
    families = sorted({t.task.family for t in trajectories})
    result = figures(groups)
    result["pass@k"] = {str(k): float(np.mean([pass_at_k(len(group), int(sum(scores(group))), k) for group in groups]))
                        for k in sorted({1, 2, 4, 8, 16, n}) if k <= n}
    result["avg@k"] = {str(n): float(np.mean([np.mean(scores(group)[:n]) for group in groups]))}
    result |= {
        "samples": n,
        "steps_mean": float(np.mean([len(t.turns) for t in trajectories])),
        "steps_mean_correct": float(np.mean([len(t.turns) for t in hits])) if hits else None,
        "urls_mean": float(np.mean([len(t.urls) for t in trajectories])),
        "format_error_rate": float(np.mean([t.status == "format_error" for t in trajectories])),
        "status": dict(Counter(t.status for t in trajectories)),
        "format_errors": dict(Counter(t.error for t in trajectories if t.error)),
        "tool_calls": {name: count / len(trajectories) for name, count in sorted(calls.items())},
        "by_family": {family: figures([g for g in groups if g[0].task.family == family]) for family in families},
        "by_hops": {f"{family} {hops}": figures([g for g in groups if (g[0].task.family, g[0].task.hops) == (family, hops)])
                    for family, hops in sorted({(t.task.family, t.task.hops) for t in trajectories})},
        "by_template": {template: figures([g for g in groups if g[0].task.meta.get("template", "own") == template])
                        for template in sorted({t.task.meta.get("template", "own") for t in trajectories})},
        "settings": settings,
    }
    return result


def format_table(result: dict) -> str:
    """The figures as a text table: overall, then by family, hops and template."""
    lines = [f"{'':14s} {'tasks':>6s} {'Pass@1':>8s}   95% interval"]
    rows = [("all", result)] + [(name, row) for part in ("by_family", "by_hops", "by_template") for name, row in result[part].items()]
    for name, row in rows:
        lines.append(f"{name:14s} {row['n']:6d} {row['pass@1']:8.1%}   {row['pass@1_ci'][0]:.1%} to {row['pass@1_ci'][1]:.1%}")
    at_k = ", ".join(f"pass@{k} {value:.1%}" for k, value in result["pass@k"].items())
    used = ", ".join(f"{name} {value:.2f}" for name, value in result["tool_calls"].items()) or "none"
    lines.append(f"{at_k}; steps {result['steps_mean']:.2f}; URLs {result['urls_mean']:.1f}; "
                 f"format errors {result['format_error_rate']:.1%}; calls a trajectory: {used}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ policies

def make_trajectories(tasks: list[Task], samples: int, seed: int, step: int) -> list[Trajectory]:
    return [Trajectory(task, trajectory_key(seed, step, task, attempt)) for task in tasks for attempt in range(samples)]


def api_rollout(trajectory: Trajectory, url: str, model: str, toolbox: Toolbox, args: RolloutArgs) -> Trajectory:
    """The agent loop for a model behind an OpenAI-style endpoint: the same prompt, tools and limits, as text messages.

    Raises:
        requests.RequestException: the server cannot be reached or refuses.
    """
    messages = [{"role": "system", "content": SYSTEM_PROMPT.format(signatures="; ".join(SIGNATURES))},
                {"role": "user", "content": trajectory.task.question}]
    tools = toolbox.tools_for(trajectory)
    while trajectory.status == "running":
        if len(trajectory.turns) == args.max_turns:
            trajectory.status = "over_turns"
            break
        reply = requests.post(f"{url.rstrip('/')}/chat/completions", timeout=600, json={
            "model": model, "messages": messages, "temperature": args.temperature, "max_tokens": args.max_new_tokens})
        reply.raise_for_status()
        text = reply.json()["choices"][0]["message"].get("content") or ""
        turn = Turn([], [], version=-1)
        trajectory.turns.append(turn)
        try:
            calls, answer = parse_action(text, tools)
        except FormatError as error:
            trajectory.status, trajectory.error = "format_error", error.kind
            break
        if answer is not None:
            trajectory.status, trajectory.answer = "answered", answer
            break
        turn.calls = [{"name": call.name, "arguments": call.arguments} for call in calls]
        take_results(trajectory, run_calls(calls, tools), None, args)
        content = "".join(f"<tool_response>{result}</tool_response>" for result in turn.results)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": content}]
    toolbox.close(trajectory)
    return trajectory


def closed_book(trajectory: Trajectory, model, chat: Chat) -> None:
    """The model's greedy answer when it must answer at once, without tools: what it knows by heart."""
    ids = chat.head(trajectory.task.question) + chat.trusted("<answer>")
    prompt, stop = len(ids), chat.trusted("</answer>")[0]
    with torch.no_grad():
        while len(ids) < prompt + 12:
            ids.append(int(model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == stop:
                break
    trajectory.status, trajectory.answer = "answered", chat.decode(ids[prompt:]).split("<")[0].strip()


def read_snippet(trajectory: Trajectory, toolbox: Toolbox, nearest: bool) -> None:
    """Search the question once and copy from the top hit's snippet: its first fact, or the one nearest to the question."""
    search, _ = toolbox.index_of(trajectory.task)
    lines = search(queries=[trajectory.task.question]).splitlines()
    facts = re.findall(r"([^.]*?) is (\w+)\.", lines[1]) if len(lines) > 1 else []
    facts = [(subject, value) for subject, value in facts if value not in ("a", "an")]
    words = set(re.findall(r"\w+", trajectory.task.question.casefold()))
    if nearest:
        facts.sort(key=lambda fact: -len(words & set(re.findall(r"\w+", fact[0].casefold()))))
    trajectory.status, trajectory.answer = "answered", facts[0][1] if facts else ""


def open_policy(name: str, args: RolloutArgs, device: torch.device | str | None = None):
    """(model, chat, engine) of a local policy."""
    model, tokenizer = load_policy(name, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chat = Chat(tokenizer, SIGNATURES)
    return model, chat, Engine(model, chat.end_id, args.slots, args.max_context, args.max_new_tokens, args.temperature, chat.before_question, args.kv_tokens)


def main():
    args, rollout_args = parse_flags((EvaluateArgs, RolloutArgs), __doc__)
    keep_memory()
    try:
        tasks = load_tasks(args.tasks)[:args.limit or None]
        if args.samples < 1:
            raise ValueError("--samples must be at least 1")
        if args.baseline not in ("", "closed_book", "top_snippet", "snippet_reader"):
            raise ValueError(f"--baseline {args.baseline}: choose closed_book, top_snippet or snippet_reader")
        if args.api and not args.api_model:
            raise ValueError("--api needs --api_model NAME")
        toolbox = Toolbox(rollout_args.corpus, rollout_args.live, rollout_args.search_results, rollout_args.page_chars,
                          rollout_args.search, rollout_args.search_url, rollout_args.unsafe_python)
        if not (rollout_args.live and not rollout_args.corpus):
            toolbox.prepare(tasks)
        if not args.api and args.baseline in ("", "closed_book"):
            model, chat, engine = open_policy(args.model, rollout_args)
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: {error}")

    trajectories = make_trajectories(tasks, 1 if args.baseline else args.samples, args.seed, 0)
    started = time.time()
    with tqdm(total=len(trajectories), desc="evaluate", unit="trajectory", mininterval=1) as progress:
        if args.baseline:
            for trajectory in trajectories:
                if args.baseline == "closed_book":
                    closed_book(trajectory, model, chat)
                else:
                    read_snippet(trajectory, toolbox, args.baseline == "snippet_reader")
                progress.update()
        elif args.api:
            with ThreadPoolExecutor(16) as pool:
                futures = [pool.submit(api_rollout, t, args.api, args.api_model, toolbox, rollout_args) for t in trajectories]
                try:
                    for future in futures:
                        future.result()
                        progress.update()
                except (requests.RequestException, KeyError, ValueError) as error:
                    pool.shutdown(wait=False, cancel_futures=True)
                    sys.exit(f"evaluate.py: the server at {args.api} failed: {error}")
        else:
            rollout(engine, chat, trajectories, toolbox, rollout_args, on_finish=lambda _: progress.update())

    settings = asdict(args) | asdict(rollout_args) | {"seconds": round(time.time() - started, 1), "torch": torch.__version__}
    result = summarise(trajectories, settings, args.seed)
    print(format_table(result))
    if args.trajectories:
        with open(args.trajectories, "w", encoding="utf-8") as file:
            for t in trajectories:
                text = "" if args.api or args.baseline else chat.decode(t.segments[-1].ids)
                file.write(json.dumps({"id": t.task.id, "question": t.task.question, "truth": t.task.answer, "answer": t.answer,
                                       "status": t.status, "error": t.error, "turns": len(t.turns), "text": text}) + "\n")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
