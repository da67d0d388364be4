r"""What the engine costs: turn t against t, tokens a second and memory against slots.

In: flags. Out: text tables and, with --json, the figures. Greedy decoding with no end token, so
every turn has the same number of tokens; observations are random ids. Runs of one comparison take
turns in one process, and figures are medians. "Attention aside": a turn late in a long context
reads more keys and values, which is no overhead but work. Its seconds are measured by bare
attention calls of the model's own shape, and taken off.

    python tests/bench_engine.py --quick --json engine.json
    python tests/bench_engine.py --device cuda --model random-135m \
        --slots 64,256,1024 --generate 256
"""

import copy
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as in train.py
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.hf_argparser import HfArg

from context import Trajectory
from data.task import Task
from engine import Engine, Slot, keep_memory, load_policy
from rollout import RolloutArgs
from support.flags import parse_flags
from support.processes import cores_of

SHOWN_TURNS = (1, 2, 10, 20, 30, 40, 50)


@dataclass
class BenchArgs:
    model: str = HfArg(
        default="nano",
        help="nano, a checkpoint, a .gguf file or a hub name; random-135m: SmolLM2-135M's shape, with "
        "random weights",
    )
    device: Literal["cpu", "cuda"] = HfArg(
        default="cpu", help="cuda: prompts of 512, 256 new tokens"
    )
    precision: Literal["bf16", "fp32"] = HfArg(default="bf16", help="on a GPU")
    generate: int = HfArg(
        default=0,
        help="on a GPU: transformers' model.generate in turn with so many slots (0: never)",
    )
    turns: int = HfArg(default=50, help="turns of a trajectory")
    new_tokens: int = HfArg(default=16, help="sampled tokens of a turn; observations have as many")
    slots: str = HfArg(default="8,32,64,128", help="numbers of slots to compare")
    repeats: int = HfArg(default=3, help="runs of each figure")
    threads: int = HfArg(default=0, help="CPU threads (0: all cores)")
    quick: bool = HfArg(default=False, help="one run of each, slots 8 and 32 and 64")
    json: str = HfArg(default="", help="write the figures to this file")


def make_engine(
    model, slots: int, max_context: int, new_tokens: int, precision: str = "fp32"
) -> Engine:
    """A greedy engine whose every turn has `new_tokens` tokens, with all its slots taken."""
    args = RolloutArgs(
        slots=slots,
        max_context=max_context,
        max_new_tokens=new_tokens,
        temperature=0.0,
        precision=precision,
    )
    chat = SimpleNamespace(end_id=-1, before_question=[])
    engine = Engine(model, chat, args)
    engine.slots = [Slot(Trajectory(Task("t", "q", "a"), (0, number))) for number in range(slots)]
    return engine


def random_ids(rng, count: int) -> list[int]:
    return rng.integers(300, 2000, count).tolist()


def play_turn(engine: Engine, prompts: list[list[int]]) -> float:
    """One turn of every slot; returns its seconds."""
    clock = time.perf_counter()
    for slot, prompt in zip(engine.slots, prompts):
        engine.start_turn(slot, prompt)
    while not engine.at_boundary():
        engine.step()
    return time.perf_counter() - clock


def play_turns(engine: Engine, rng, turns: int, new_tokens: int) -> tuple[list[float], list]:
    """Seconds of each turn, and the prompts of the last one. Each turn adds 2 x `new_tokens`."""
    prompts, seconds = [random_ids(rng, 2 * new_tokens) for _ in engine.slots], []
    for _ in range(turns):
        seconds.append(play_turn(engine, prompts))
        last = prompts
        prompts = [
            prompt + slot.ids + random_ids(rng, new_tokens)
            for prompt, slot in zip(prompts, engine.slots)
        ]
    return seconds, last


def cost_of_turns(model, turns: int, new_tokens: int, repeats: int, slots: int = 4) -> dict:
    """Seconds of turn 1 to `turns` of trajectories whose every turn adds 2 x `new_tokens` tokens.

    Returns:
        turn_s: median seconds of each turn.
        turn50_over_turn2_with_attention: the last turns over the first ones, as they are.
        turn50_over_turn2: the same, less what attention to the longer context costs.
        reencoded_over_turn2: what the last turn costs if its context is computed again.
    """
    rng, size = np.random.default_rng(0), 2 * new_tokens
    times, runs = [], []
    for _ in range(repeats + 1):
        engine = make_engine(model, slots, turns * size + size, new_tokens)
        seconds, last = play_turns(engine, rng, turns, new_tokens)
        late = attention_seconds(model, slots, turns * size, new_tokens)
        early = attention_seconds(model, slots, 2 * size, new_tokens)
        engine.new_weights(1)
        run = {
            "turn2_s": statistics.median(seconds[1:5]),
            "last_s": statistics.median(seconds[-4:]),
            "attention_s": late - early,
            "reencoded_s": play_turn(engine, last),
        }
        times.append(seconds)
        runs.append(run)
    times, runs = times[1:], runs[1:]  # the first warmed up
    median = lambda values: statistics.median(list(values))
    return {
        "turn_s": [median(seconds[k] for seconds in times) for k in range(turns)],
        "turn50_over_turn2": median((r["last_s"] - r["attention_s"]) / r["turn2_s"] for r in runs),
        "turn50_over_turn2_with_attention": median(r["last_s"] / r["turn2_s"] for r in runs),
        "reencoded_over_turn2": median(r["reencoded_s"] / r["turn2_s"] for r in runs),
        "turns": turns,
        "new_tokens": new_tokens,
        "runs": runs,
    }


@torch.no_grad()
def attention_seconds(model, slots: int, context: int, steps: int) -> float:
    """Seconds of bare attention over a context of that length, in all layers: one pass of `steps`
    new tokens, then `steps` decoding steps.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    layers = [torch.randn(2, slots, shared, context, size) for _ in range(config.num_hidden_layers)]
    queries = []
    for new in [steps] + [1] * steps:
        rows = heads // shared * new
        queries.append(
            (torch.randn(slots, shared, rows, size), torch.zeros(slots, 1, rows, context))
        )
    clock = time.perf_counter()
    for query, mask in queries:
        for keys, values in layers:
            torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return time.perf_counter() - clock


def tokens_against_slots(
    model, numbers: list[int], repeats: int, context: int = 256, new_tokens: int = 32
) -> list[dict]:
    """Tokens a second (prefill apart) and KV memory for each number of slots; the numbers take
    turns.
    """
    rng, runs_of = np.random.default_rng(0), {slots: [] for slots in numbers}
    for _ in range(repeats + 1):
        for slots in numbers:
            engine = make_engine(model, slots, 2 * context, new_tokens)
            lengths = rng.integers(context // 2, context, slots)
            play_turn(engine, [random_ids(rng, length) for length in lengths])
            stored, stats = engine.cache.keys + engine.cache.values, engine.stats
            runs_of[slots].append(
                {
                    "tokens_per_s": slots * (new_tokens - 1) / stats["decode_s"],
                    "prefill_tokens_per_s": stats["prefilled"] / stats["prefill_s"],
                    "kv_mib": sum(x.numel() * x.element_size() for x in stored) / 2**20,
                }
            )
    rows = []
    for slots, runs in runs_of.items():
        runs = runs[1:]  # the first warmed up
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append({"slots": slots} | median | {"runs": [run["tokens_per_s"] for run in runs]})
    return rows


def format_result(result: dict) -> str:
    turns, count = result["turns"], result["turns"]["turns"]
    shown = [t for t in SHOWN_TURNS if t <= count]
    lines = [
        "turn    " + "".join(f"{t:>8d}" for t in shown),
        "ms      " + "".join(f"{turns['turn_s'][t - 1] * 1e3:8.1f}" for t in shown),
        f"turn {count} over turn 2: {turns['turn50_over_turn2_with_attention']:.2f}; "
        f"attention's own growth aside {turns['turn50_over_turn2']:.2f}; "
        f"if the context is computed again {turns['reencoded_over_turn2']:.1f}",
        f"{'slots':>8s}{'decode tokens/s':>18s}{'prefill tokens/s':>18s}{'KV MiB':>10s}",
    ]
    for row in result["slots"]:
        figures = f"{row['tokens_per_s']:18.0f}{row['prefill_tokens_per_s']:18.0f}"
        lines.append(f"{row['slots']:8d}{figures}{row['kv_mib']:10.1f}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- on a GPU


def random_135m() -> LlamaForCausalLM:
    """SmolLM2-135M's shape. How fast it is does not depend on its weights."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def copy_bandwidth() -> float:
    """Bytes a second that this GPU reads and writes when it copies 4 GiB."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        clock = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - clock)
    return 2 * source.nbytes / statistics.median(seconds[1:])


def gpu_run(model, slots: int, precision: str, prompt: int, new_tokens: int) -> dict:
    """Decoding and prefill of all slots at once, greedy, and how much of it is memory traffic.

    Returns:
        tokens_per_s: decoded tokens a second; prompts apart.
        whole_tokens_per_s: the same, with the time of the prompts.
        bytes_per_step: weights, and the keys and values of the mean context, which each step reads.
    """
    rng = np.random.default_rng(0)
    engine = make_engine(model, slots, prompt + new_tokens, new_tokens, precision)
    play_turn(engine, [random_ids(rng, prompt) for _ in range(slots)])  # records the graphs
    engine.new_weights(1)
    before = dict(engine.stats)
    seconds = play_turn(engine, [random_ids(rng, prompt) for _ in range(slots)])
    decode_s = engine.stats["decode_s"] - before["decode_s"]
    stored = engine.cache.keys + engine.cache.values
    of_a_token = sum(x.nbytes for x in stored) / engine.cache.count / engine.cache.columns
    weights = sum(p.nbytes for p in engine.model.parameters())
    step_bytes = weights + slots * (prompt + new_tokens / 2) * of_a_token
    return {
        "tokens_per_s": slots * (new_tokens - 1) / decode_s,
        "whole_tokens_per_s": slots * new_tokens / seconds,
        "prefill_tokens_per_s": slots * prompt / (seconds - decode_s),
        "bytes_per_step": step_bytes,
        "step_ms": decode_s / (new_tokens - 1) * 1e3,
        "kv_gib": sum(x.nbytes for x in stored) / 2**30,
    }


def generate_run(model, slots: int, precision: str, prompt: int, new_tokens: int) -> float:
    """Tokens a second, prompts included, of transformers' model.generate on one batch."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = copy.deepcopy(model).to(dtype)
    ids = torch.randint(300, 2000, (slots, prompt), device="cuda")
    how = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    model.generate(ids[:, :32], attention_mask=torch.ones_like(ids[:, :32]), **how)
    torch.cuda.synchronize()
    clock = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    torch.cuda.synchronize()
    return slots * new_tokens / (time.perf_counter() - clock)


def bench_gpu(args: BenchArgs, model, prompt: int = 512, new_tokens: int = 256) -> dict:
    """The engine against model.generate, for each number of slots; prints as it goes."""
    model, bandwidth = model.to("cuda"), copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.precision}, a copy moves "
        f"{bandwidth / 1e12:.2f} TB/s; prompts of {prompt}, {new_tokens} new tokens\n"
        f"{'slots':>8s}{'decode tok/s':>14s}{'with prompts':>14s}{'ms a step':>11s}"
        f"{'bandwidth':>11s}{'KV GiB':>8s}{'generate tok/s':>16s}{'ratio':>7s}"
    )
    rows = []
    for slots in map(int, args.slots.split(",")):
        runs, others = [], []
        for _ in range(1 if args.quick else args.repeats):  # in turn
            runs.append(gpu_run(model, slots, args.precision, prompt, new_tokens))
            if args.generate == slots:
                others.append(generate_run(model, slots, args.precision, prompt, new_tokens))
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        row["bandwidth_share"] = row["bytes_per_step"] / row["step_ms"] * 1e3 / bandwidth
        line = (
            f"{slots:8d}{row['tokens_per_s']:14,.0f}{row['whole_tokens_per_s']:14,.0f}"
            f"{row['step_ms']:11.2f}{row['bandwidth_share']:11.0%}{row['kv_gib']:8.1f}"
        )
        if others:
            row["generate_tokens_per_s"] = statistics.median(others)
            ratio = row["whole_tokens_per_s"] / row["generate_tokens_per_s"]
            line += f"{row['generate_tokens_per_s']:16,.0f}{ratio:7.1f}"
        print(line, flush=True)
        rows.append({"slots": slots} | row)
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(f"most memory at once: {memory:.1f} GiB")
    return {"settings": asdict(args), "bandwidth": bandwidth, "rows": rows, "peak_gib": memory}


def main():
    [args] = parse_flags((BenchArgs,), __doc__)
    keep_memory()
    torch.set_num_threads(args.threads or cores_of(1))
    try:
        model = random_135m() if args.model == "random-135m" else load_policy(args.model)[0]
    except ValueError as error:
        sys.exit(f"bench_engine.py: {error}")
    if args.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("bench_engine.py: --device cuda: torch sees no GPU")
        result = bench_gpu(args, model.eval())
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1))
        return
    repeats = 1 if args.quick else args.repeats
    numbers = "8,32,64" if args.quick else args.slots
    turns = cost_of_turns(model, args.turns, args.new_tokens, repeats)
    result = {
        "settings": asdict(args) | {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "turns": turns,
        "slots": tokens_against_slots(model, [int(n) for n in numbers.split(",")], repeats),
        "turn50_over_turn2": turns["turn50_over_turn2"],
    }
    print(format_result(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
