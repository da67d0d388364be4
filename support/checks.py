"""Checks of the flags of train.py and evaluate.py, beside those that their types make.

Each raises ValueError with one clear line for a flag that cannot work.
"""

import math
import os

from accelerate.tracking import get_available_trackers

from context import MANAGERS
from rollout import budget_of


def at_least(args, least: float, *names: str) -> None:
    for name in names:
        if not getattr(args, name) >= least:  # "not >=" refuses nan too
            raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}")


def finite(args, *names: str) -> None:
    for name in names:
        if not math.isfinite(getattr(args, name)):
            raise ValueError(f"--{name} must be finite, not {getattr(args, name)}")


def check_rollout_args(args) -> None:
    at_least(args, 1, "max_turns", "max_new_tokens", "max_context", "observation_tokens", "slots")
    at_least(args, 1, "search_results", "page_chars", "tool_steps")
    at_least(args, 0, "temperature", "context_budget", "kv_tokens")
    at_least(args, 0.001, "tool_timeout_s", "trajectory_timeout_s")
    finite(args, "temperature")
    if bool(args.engine) != bool(args.engine_weights):
        raise ValueError("--engine URL and --engine_weights DIR go together")
    if args.context not in MANAGERS:
        raise ValueError(f"--context {args.context}: choose {', '.join(MANAGERS)}")
    if args.max_new_tokens >= args.max_context:
        raise ValueError(
            f"--max_context {args.max_context} leaves no room for a prompt: "
            f"it must be larger than --max_new_tokens {args.max_new_tokens}"
        )
    # Behind a prompt within its budget come an action, the request for notes, and the notes.
    most = args.max_context - 2 * args.max_new_tokens - 64
    if args.context == "summarize" and budget_of(args) > most:
        raise ValueError(
            "--context summarize needs room for an action and notes behind the prompt: "
            f"--context_budget {most} or less, or a larger --max_context"
        )


def check_args(args, rollout_args, async_args) -> None:
    at_least(args, 1, "steps", "tasks_per_step", "samples", "micro_tokens", "save_every", "warmup")
    at_least(args, 1, "nominal_tokens")
    at_least(args, 0, "seed", "decay_steps", "eval_every", "eval_tasks", "threads", "processes")
    at_least(args, 0, "format_penalty", "negatives", "learning_rate", "max_grad_norm")
    at_least(args, 0, "keep_trajectories")
    finite(args, "learning_rate", "max_grad_norm", "format_penalty")
    if not (args.learning_rate and args.max_grad_norm):
        raise ValueError("--learning_rate and --max_grad_norm must be above 0")
    if not 0 < args.gamma <= 1:
        raise ValueError("--gamma must be above 0 and at most 1")
    check_rollout_args(rollout_args)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if not rollout_args.engine:
            raise ValueError(
                "a learner that FSDP shards cannot be its own sampler: give --engine URL and "
                "--engine_weights DIR (docs/engines.md)"
            )
        if os.environ.get("FSDP_VERSION") != "2":
            raise ValueError("FSDP2 is needed: accelerate launch --use_fsdp --fsdp_version 2")
    if rollout_args.temperature == 0:
        raise ValueError(
            "--temperature must be above 0 in training: greedy decoding has nothing to learn from"
        )
    there = sorted(map(str, get_available_trackers()))
    if args.log_with and args.log_with not in there:
        raise ValueError(
            f"--log_with {args.log_with}: there is {', '.join(there) or 'no tracker'} on this "
            "machine; pip install the tracker's package, or leave the flag out"
        )
    at_least(async_args, 0, "workers", "ahead", "budget_s", "budget_tokens")
    at_least(async_args, 1, "max_age")
    finite(async_args, "ahead", "budget_s")
    if async_args.partial and args.rollout != "async":
        raise ValueError("--partial needs --rollout async")
    only_partial = async_args.overlap or async_args.budget_s or async_args.budget_tokens
    if only_partial and not async_args.partial:
        raise ValueError("--overlap, --budget_s and --budget_tokens need --partial")
