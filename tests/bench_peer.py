"""Our step against TRL's GRPOTrainer with tools: the same model, tasks, tools, tool latency and number of trajectories.

They take turns (A B C A B C): TRL makes one optimizer step, then ours makes one with the same tasks and `--rollout async` (a
rollout process of one thread on each core) and one with `--rollout sync` (in the trainer's process, all cores), and so on; the
first round warms up and is not counted. Every trajectory is trained, and all modes are strictly on-policy: async without
--partial waits for all of a step's trajectories. In: flags. Out: a table, and with --json the runs and the medians of their
ratios. To compare with another library, write a function like `compare_with_trl`.

TRL is optional: pip install trl==1.16.0

    python tests/bench_peer.py --json peer.json

What is the same: weights, prompt ids, tool texts, temperature, 8 model steps a trajectory, at most 96 new tokens a step, the
number of trajectories, float32, cores. What differs: random draws (so turns and tokens agree only on average: both are
printed); the window (TRL counts it as completion tokens); TRL calls tools one after another, ours side by side; TRL
generates with transformers' `generate`, padded batches that encode the whole transcript anew each turn; and its loss is
GRPO's (`dr_grpo`, beta 0, one pass over the data, no gradient checkpointing), whose arithmetic is that of ours.
"""

import functools
import json
import os
import statistics
import sys
import tempfile
import time
import types
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as in train.py
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from accelerate import Accelerator

from context import SYSTEM_PROMPT, Chat, Trajectory
from data.task import load_tasks
from engine import keep_memory, load_policy
from reward import correct
from rollout import RolloutArgs, engine_for, rollout, trajectory_key
from support.flags import parse_flags
from support.run_folder import cores_of, use_threads
from support.toolbox import Toolbox
from tools import signatures
from train import Policy, TrainArgs, gradient, rows_of
from workers import Rollouts, Setup, make_group


@dataclass
class PeerArgs:
    pairs: int = field(default=3, metadata={"help": "counted steps of each side"})
    trajectories: int = field(default=32, metadata={"help": "trajectories a step, in groups of 8"})
    tool_ms: float = field(default=50.0, metadata={"help": "latency added to each tool call"})
    threads: int = field(default=0, metadata={"help": "CPU threads (0: all cores)"})
    trl_batch: int = field(
        default=8,
        metadata={"help": "TRL's per_device_train_batch_size; ours is --micro_tokens of train.py"},
    )
    json: str = field(default="", metadata={"help": "write the figures to this file"})


class Delayed:
    """A tool with latency."""

    def __init__(self, tool, seconds: float):
        self.tool, self.seconds = tool, seconds

    def __getattr__(self, name):
        return getattr(self.tool, name)

    def __call__(self, **arguments) -> str:
        time.sleep(self.seconds)
        return self.tool(**arguments)


class DelayedToolbox(Toolbox):
    def __init__(self, seconds: float, **arguments):
        super().__init__(**arguments)
        self.seconds = seconds

    def tools_for(self, trajectory) -> dict:
        return {
            name: Delayed(tool, self.seconds)
            for name, tool in super().tools_for(trajectory).items()
        }


def open_delayed(seconds: float, args: RolloutArgs) -> DelayedToolbox:
    """As `rollout.open_toolbox`."""
    return DelayedToolbox(seconds)


# The nano model's own format as TRL wants it: one template that also renders tool calls and tool results.
TRL_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m['content'] + '</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}{% for c in m['tool_calls'] or [] %}{{ '<tool_call>' + "
    "(c['function'] | tojson) + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRL_RESPONSE = {  # how transformers reads a sampled turn
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {
            "open": "<think>",
            "close_pattern": r"</think>\s*",
            "content": "text",
        },
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def our_step(model, play, optimizer, accelerator, number: int, args: RolloutArgs) -> dict:
    """One step of ours: rollouts (`play()` gives the trajectories), rewards, update over every sampled token."""
    clock = time.perf_counter()
    trajectories = play()
    rollout_s = time.perf_counter() - clock
    rows = []
    for t in trajectories:
        outcome = correct(t.answer or "", t.task.answer, t.task.answer_type)
        rows += rows_of(
            t, [outcome - 0.5] * len(t.turns), number
        )  # no weight is 0: all are trained, as TRL does
    gradient(
        Policy(model, args.temperature), accelerator, rows, len(trajectories) * 128, TrainArgs()
    )
    optimizer.step()
    optimizer.zero_grad()
    return {
        "rollout_s": rollout_s,
        "step_s": time.perf_counter() - clock,
        "turns": sum(len(t.turns) for t in trajectories),
        "tokens": sum(len(turn.action_ids) for t in trajectories for turn in t.turns),
        "calls": sum(len(turn.calls) for t in trajectories for turn in t.turns),
    }


def compare_with_trl(
    pairs: int = 3,
    trajectories: int = 32,
    tool_ms: float = 50.0,
    threads: int = 0,
    trl_batch: int = 8,
) -> dict:
    """Steps of TRL and of ours in turn.

    Args:
        pairs: counted steps of each. trajectories: of one step, a multiple of 8. tool_ms: latency added to each call.
        threads: 0 for all cores. trl_batch: trajectories in one forward and backward pass of TRL.

    Returns:
        trl_rollout_ratio, trl_step_ratio: median over the pairs of TRL's seconds / our seconds with --rollout async;
        trl_rollout_ratio_sync, trl_step_ratio_sync: with --rollout sync; `runs`: each round's figures.

    Raises:
        ImportError: TRL is not installed; the message says how to install it.
        RuntimeError: the two sides did not see the same prompts, or TRL ran no tool.
    """
    try:
        import datasets
        import trl
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(
            f"the comparison with TRL needs it ({error}): pip install trl==1.16.0"
        ) from None
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    keep_memory()
    use_threads(threads, 1)
    args = RolloutArgs(slots=trajectories)
    # One world, so that TRL's tools, which know no task, search the same pages.
    first = load_tasks(ROOT / "data" / "train.jsonl")
    tasks = [task for task in first if task.meta["world"] == first[0].meta["world"] and task.hops][
        : trajectories // 8 * (pairs + 1)
    ]
    toolbox = DelayedToolbox(tool_ms / 1000)
    toolbox.prepare(tasks)

    model, tokenizer = load_policy("nano")
    chat = Chat(tokenizer, signatures())
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    engine = engine_for(model, chat, args)
    cores, coming = threads or cores_of(1), []
    pool = Rollouts(
        model,
        Setup("nano", args, toolbox=functools.partial(open_delayed, tool_ms / 1000)),
        cores,
        lambda n, version: make_group(coming.pop(0), n, version, 8, 0) if coming else None,
        trajectories // 8,
    )

    their_model, their_tokenizer = load_policy("nano")
    their_tokenizer.chat_template, their_tokenizer.response_template = TRL_TEMPLATE, TRL_RESPONSE
    system = SYSTEM_PROMPT.format(signatures="; ".join(signatures()))
    prompt_of = lambda task: [
        {"role": "system", "content": system},
        {"role": "user", "content": task.question},
    ]
    if their_tokenizer.apply_chat_template(
        prompt_of(tasks[0]), add_generation_prompt=True, tokenize=True, return_dict=False
    ) != chat.head(tasks[0].question):
        raise RuntimeError("TRL's first prompt differs from ours")
    shared = toolbox.tools_for(
        types.SimpleNamespace(task=tasks[0], key=("trl",))
    )  # one set for all, as TRL has it

    def search(queries: list[str]) -> str:
        """Search.

        Args:
            queries: what to look for.
        """
        return shared["search"](queries=queries)

    def browse(url: str) -> str:
        """Open a page.

        Args:
            url: its address.
        """
        return shared["browse"](url=url)

    def python(code: str) -> str:
        """Run code.

        Args:
            code: the program.
        """
        return shared["python"](code=code)

    def right(prompts, completions, answer, answer_type, **_) -> list[float]:
        texts = [completion[-1].get("content") or "" for completion in completions]
        texts = [text.split("<answer>")[-1].split("</answer>")[0] for text in texts]
        return [correct(text, truth, kind) for text, truth, kind in zip(texts, answer, answer_type)]

    runs, current = [], {}

    class Pairs(TrainerCallback):
        def on_step_begin(self, *_, **__):
            current.clear()
            current["clock"] = time.perf_counter()

        def on_step_end(self, trl_args, state, control, **_):
            theirs = {"step_s": time.perf_counter() - current["clock"], **current["generate"]}
            number = 2 * state.global_step

            def play_async():
                pool.publish(model, number)  # the hand-over of the weights is part of the step
                coming.extend(current["tasks"])
                return [t for group in pool.collect(number) for t in group.trajectories]

            def play_sync():
                engine.new_weights(number + 1)
                return rollout(
                    engine,
                    chat,
                    [
                        Trajectory(task, trajectory_key(0, number, task, attempt))
                        for task in current["tasks"]
                        for attempt in range(8)
                    ],
                    toolbox,
                    args,
                )

            ours = our_step(model, play_async, optimizer, accelerator, number, args)
            in_sync = our_step(model, play_sync, optimizer, accelerator, number + 1, args)
            if state.global_step > 1:  # the first round warms up
                runs.append({"trl": theirs, "ours": ours, "ours_sync": in_sync})
                for name, side in (("", ours), ("_sync", in_sync)):
                    runs[-1] |= {
                        f"{part}_ratio{name}": theirs[f"{part}_s"] / side[f"{part}_s"]
                        for part in ("rollout", "step")
                    }
                print(format_run(runs[-1]), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            per_device_train_batch_size=trl_batch,
            gradient_accumulation_steps=trajectories // trl_batch,
            num_generations=8,
            max_steps=pairs + 1,
            learning_rate=1e-6,
            beta=0.0,
            loss_type="dr_grpo",
            temperature=args.temperature,
            max_completion_length=args.max_context - len(chat.before_question) - 32,
            max_tool_calling_iterations=args.max_turns - 1,
        )
        trainer = trl.GRPOTrainer(
            their_model,
            reward_funcs=right,
            args=config,
            processing_class=their_tokenizer,
            tools=[search, browse, python],
            callbacks=[Pairs()],
            train_dataset=datasets.Dataset.from_list(
                [
                    {"prompt": prompt_of(t), "answer": t.answer, "answer_type": t.answer_type}
                    for t in tasks
                ]
            ),
        )
        trainer.generation_config.max_new_tokens = (
            args.max_new_tokens
        )  # a turn's limit, as ours; else it would be the whole completion's
        generate, single_turn, by_question, counts = (
            trainer._generate,
            trainer._generate_single_turn,
            {t.question: t for t in tasks},
            {},
        )

        def timed_generate(prompts):
            counts.update(turns=0, tokens=0)
            clock = time.perf_counter()
            result = generate(prompts)
            current["generate"] = {"rollout_s": time.perf_counter() - clock, **counts}
            current["tasks"] = [
                by_question[question]
                for question in dict.fromkeys(prompt[1]["content"] for prompt in prompts)
            ]
            return result

        def counted_turn(*arguments, **options):
            result = single_turn(*arguments, **options)
            counts["turns"] += len(result[0])
            counts["tokens"] += sum(map(len, result[0]))
            return result

        trainer._generate, trainer._generate_single_turn = timed_generate, counted_turn
        try:
            trainer.train()
        finally:
            pool.close()
            toolbox.close_all()
    if all(run["trl"]["turns"] <= trajectories for run in runs):
        raise RuntimeError("TRL ran no tool: its parser did not understand the model's calls")
    median = lambda key: statistics.median(run[key] for run in runs)
    return {
        "trl_rollout_ratio": median("rollout_ratio"),
        "trl_step_ratio": median("step_ratio"),
        "trl_rollout_ratio_sync": median("rollout_ratio_sync"),
        "trl_step_ratio_sync": median("step_ratio_sync"),
        "runs": runs,
        "settings": {
            "trl": trl.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "pairs": pairs,
            "trajectories": trajectories,
            "tool_ms": tool_ms,
            "trl_batch": trl_batch,
        },
    }


def format_run(run: dict) -> str:
    """One round as lines of text."""
    side = lambda s: (
        f"rollout {s['rollout_s']:5.1f} s, step {s['step_s']:5.1f} s, {s['turns']:4d} turns, {s['tokens']:5d} tokens"
    )
    ratio = lambda name: (
        f"ratio rollout {run[f'rollout_ratio{name}']:.2f}, step {run[f'step_ratio{name}']:.2f}"
    )
    return f"TRL         {side(run['trl'])}\nours, async {side(run['ours'])}, {ratio('')}\nours, sync  {side(run['ours_sync'])}, {ratio('_sync')}"


def main():
    [args] = parse_flags((PeerArgs,), __doc__)
    if args.trajectories % 8 or args.trajectories % args.trl_batch:
        sys.exit("bench_peer.py: --trajectories must be a multiple of 8 and of --trl_batch")
    try:
        result = compare_with_trl(
            **{key: value for key, value in asdict(args).items() if key != "json"}
        )
    except ImportError as error:
        sys.exit(f"bench_peer.py: {error}")
    print(
        f"median of {args.pairs}: "
        + ", ".join(f"{key} {value:.2f}" for key, value in result.items() if key.startswith("trl_"))
    )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
