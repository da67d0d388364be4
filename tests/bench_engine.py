"""What the engine costs: turn t against t, tokens a second and memory against slots.

In: flags. Out: text tables and, with --json, the figures. Greedy decoding with no end token, so every turn has the same
number of tokens; observations are random ids. Runs of one comparison take turns in one process; figures are medians.
"Attention aside": a turn late in a long context reads more keys and values, which is no overhead but work; its share is
measured with the same number of rows, prompts as long and no earlier turns, and taken off.

    python tests/bench_engine.py --quick --json engine.json
"""

import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as in train.py
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from context import Trajectory
from data.task import Task
from engine import Engine, Slot, keep_memory, load_policy
from support.flags import parse_flags
from support.run_folder import use_threads


@dataclass
class BenchArgs:
    model: str = field(
        default="nano", metadata={"help": "nano, a checkpoint folder, a .gguf file or a hub name"}
    )
    turns: int = field(default=50, metadata={"help": "turns of a trajectory"})
    new_tokens: int = field(
        default=16, metadata={"help": "sampled tokens of a turn; its observation has as many"}
    )
    slots: str = field(default="8,32,64,128", metadata={"help": "numbers of slots to compare"})
    repeats: int = field(default=3, metadata={"help": "runs of each figure"})
    threads: int = field(default=0, metadata={"help": "CPU threads (0: all cores)"})
    quick: bool = field(default=False, metadata={"help": "one run of each, slots 8 and 32 and 64"})
    json: str = field(default="", metadata={"help": "write the figures to this file"})


def make_engine(model, slots: int, max_context: int, new_tokens: int) -> Engine:
    engine = Engine(model, -1, slots, max_context, new_tokens, 0.0, [])
    engine.slots = [Slot(Trajectory(Task("t", "q", "a"), (0, number))) for number in range(slots)]
    return engine


def play_turn(engine: Engine, prompts: list[list[int]]) -> float:
    """One turn of every slot; returns its seconds."""
    clock = time.perf_counter()
    for slot, prompt in zip(engine.slots, prompts):
        engine.start_turn(slot, prompt)
    while not all(slot.turn_done for slot in engine.slots):
        engine.step()
    return time.perf_counter() - clock


def cost_of_turns(model, turns: int, new_tokens: int, repeats: int, slots: int = 4) -> dict:
    """Seconds of turn 1 to `turns` of a trajectory whose every turn adds 2 x `new_tokens` tokens.

    Returns:
        turn_s: medians. turn50_over_turn2: last turn over turn 2, as it is; attention_aside: less what attention to the
        longer context costs (the same number of decoding steps and new tokens over a context that long, minus over a short one,
        by the model alone); reencode_over_turn2: what the last turn would cost had its context to be computed again.
    """
    rng, size = np.random.default_rng(0), 2 * new_tokens
    times, grown, again, runs = [], [], [], []
    for _ in range(repeats + 1):  # the first warms up
        engine = make_engine(model, slots, turns * size + size, new_tokens)
        prompts, seconds = [rng.integers(300, 2000, size).tolist() for _ in range(slots)], []
        for _ in range(turns):
            seconds.append(play_turn(engine, prompts))
            last = prompts
            prompts = [
                prompt + slot.ids + rng.integers(300, 2000, size - new_tokens).tolist()
                for prompt, slot in zip(prompts, engine.slots)
            ]
        times.append(seconds)
        # Attention alone: the new tokens of turn `turns` and of turn 2 as bare attention calls of the model's own shape.
        grown.append(
            attention_seconds(model, slots, turns * size, new_tokens)
            - attention_seconds(model, slots, 2 * size, new_tokens)
        )
        engine.new_weights(1)
        again.append(play_turn(engine, last))
    times, grown, again = times[1:], grown[1:], again[1:]
    runs = [
        {
            "turn2_s": statistics.median(t[1:5]),
            "last_s": statistics.median(t[-4:]),
            "attention_s": g,
            "reencoded_s": a,
        }
        for t, g, a in zip(times, grown, again)
    ]
    median = lambda values: statistics.median(list(values))
    return {
        "turn_s": [median(t[k] for t in times) for k in range(turns)],
        "turn50_over_turn2": median((r["last_s"] - r["attention_s"]) / r["turn2_s"] for r in runs),
        "turn50_over_turn2_with_attention": median(r["last_s"] / r["turn2_s"] for r in runs),
        "reencoded_over_turn2": median(r["reencoded_s"] / r["turn2_s"] for r in runs),
        "turns": turns,
        "new_tokens": new_tokens,
        "runs": runs,
    }


@torch.no_grad()
def attention_seconds(model, slots: int, context: int, steps: int) -> float:
    """Seconds of bare attention over a context of that length, all layers: one pass of `steps` new tokens, then `steps` decoding steps."""
    config = model.config.get_text_config()
    heads, size = (
        config.num_attention_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    shared = getattr(config, "num_key_value_heads", None) or heads
    layers = [torch.randn(2, slots, shared, context, size) for _ in range(config.num_hidden_layers)]
    queries = [
        (
            torch.randn(slots, shared, heads // shared * new, size),
            torch.zeros(slots, 1, heads // shared * new, context),
        )
        for new in [steps] + [1] * steps
    ]
    clock = time.perf_counter()
    for query, mask in queries:
        for keys, values in layers:
            torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return time.perf_counter() - clock


def tokens_against_slots(
    model, numbers: list[int], repeats: int, context: int = 256, new_tokens: int = 32
) -> list[dict]:
    """Tokens a second (prefill apart) and KV memory for each number of slots; the numbers take turns."""
    rng, rows = np.random.default_rng(0), {}
    for _ in range(repeats + 1):
        for slots in numbers:
            engine = make_engine(model, slots, 2 * context, new_tokens)
            play_turn(
                engine,
                [
                    rng.integers(300, 2000, int(length)).tolist()
                    for length in rng.integers(context // 2, context, slots)
                ],
            )
            kept = sum(
                tensor.numel() * tensor.element_size()
                for tensor in engine.cache.keys + engine.cache.values
            )
            rows.setdefault(slots, []).append(
                (
                    slots * (new_tokens - 1) / engine.stats["decode_s"],
                    engine.stats["prefilled"] / engine.stats["prefill_s"],
                    kept,
                )
            )
    return [
        {
            "slots": slots,
            "tokens_per_s": statistics.median(run[0] for run in runs[1:]),
            "prefill_tokens_per_s": statistics.median(run[1] for run in runs[1:]),
            "kv_mib": runs[0][2] / 2**20,
            "runs": [run[0] for run in runs[1:]],
        }
        for slots, runs in rows.items()
    ]


def main():
    [args] = parse_flags((BenchArgs,), __doc__)
    keep_memory()
    use_threads(args.threads, 1)
    try:
        model, _ = load_policy(args.model)
    except ValueError as error:
        sys.exit(f"bench_engine.py: {error}")
    repeats, numbers = (
        (1, [8, 32, 64])
        if args.quick
        else (args.repeats, [int(number) for number in args.slots.split(",")])
    )
    result = {
        "settings": asdict(args) | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    }
    result |= {
        "turns": cost_of_turns(model, args.turns, args.new_tokens, repeats),
        "slots": tokens_against_slots(model, numbers, repeats),
    }
    result["turn50_over_turn2"] = result["turns"]["turn50_over_turn2"]
    turns = result["turns"]
    print("turn    " + "".join(f"{t:>8d}" for t in (1, 2, 10, 20, 30, 40, 50) if t <= args.turns))
    print(
        "ms      "
        + "".join(
            f"{turns['turn_s'][t - 1] * 1e3:8.1f}"
            for t in (1, 2, 10, 20, 30, 40, 50)
            if t <= args.turns
        )
    )
    print(
        f"turn {args.turns} over turn 2: {turns['turn50_over_turn2_with_attention']:.2f}; attention's own growth aside {turns['turn50_over_turn2']:.2f}; "
        f"had the context to be computed again {turns['reencoded_over_turn2']:.1f}"
    )
    print(f"{'slots':>8s}{'decode tokens/s':>18s}{'prefill tokens/s':>18s}{'KV MiB':>10s}")
    for row in result["slots"]:
        print(
            f"{row['slots']:8d}{row['tokens_per_s']:18.0f}{row['prefill_tokens_per_s']:18.0f}{row['kv_mib']:10.1f}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
