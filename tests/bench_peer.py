"""Our step against TRL's GRPOTrainer with tools: the same model, tasks, tools, tool latency and
number of trajectories.

They take turns (A B C A B C): TRL makes one optimizer step. Then ours makes one with the same tasks
and `--rollout async` (a rollout process of one thread on each core), and one with `--rollout sync`
(in the trainer's process, all cores), and so on. The first round warms up and is not counted. Every
trajectory is trained, and all modes are strictly on-policy: async without --partial waits for all
of a step's trajectories. In: flags. Out: a table, and with --json the runs and the medians of their
ratios. To compare with another library, write a function like `compare_with_trl`.

TRL is optional: pip install trl==1.16.0

    python tests/bench_peer.py --json peer.json

What is the same: weights, prompt ids, tool texts, temperature, 8 model steps a trajectory, at most
96 new tokens a step, the number of trajectories, float32, cores. What differs: random draws (so
turns and tokens agree only on average, and both are printed); the window (TRL counts it as
completion tokens); TRL calls tools one after another, ours side by side; TRL generates with
transformers' `generate`, in padded batches that encode the whole transcript anew each turn; and its
loss is GRPO's (`dr_grpo`, beta 0, one pass over the data, no gradient checkpointing), whose
arithmetic is that of ours.
"""

import functools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as in train.py
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.hf_argparser import HfArg

from context import SYSTEM_PROMPT, Chat, Trajectory
from data.task import Task, load_tasks
from engine import Engine, keep_memory, load_policy
from rollout import AgentLoop, RolloutArgs, new_group, play
from support.answers import correct
from support.flags import parse_flags
from support.processes import cores_of
from support.toolbox import Toolbox
from tools import signatures
from train import Policy, TrainArgs, gradient, rows_of
from workers import AsyncArgs, AsyncRollouts, Setup

SAMPLES = 8  # trajectories of one task


@dataclass
class PeerArgs:
    pairs: int = HfArg(default=3, help="counted steps of each side")
    trajectories: int = HfArg(default=32, help="trajectories a step, in groups of 8")
    tool_ms: float = HfArg(default=50.0, help="latency added to each tool call")
    threads: int = HfArg(default=0, help="CPU threads (0: all cores)")
    trl_batch: int = HfArg(
        default=8, help="TRL's per_device_train_batch_size; ours is --micro_tokens of train.py"
    )
    json: str = HfArg(default="", help="write the figures to this file")


# ---------------------------------------------------------------------------- tools with latency


class Delayed:
    """A tool with latency."""

    def __init__(self, tool, seconds: float):
        self.tool, self.seconds = tool, seconds

    def __getattr__(self, name):
        return getattr(self.tool, name)

    def __call__(self, **arguments) -> str:
        time.sleep(self.seconds)
        return self.tool(**arguments)


class DelayedToolbox:
    """A toolbox whose every tool has latency."""

    def __init__(self, toolbox, seconds: float):
        self.toolbox, self.seconds = toolbox, seconds

    def tools_for(self, trajectory) -> dict:
        tools = self.toolbox.tools_for(trajectory)
        return {name: Delayed(tool, self.seconds) for name, tool in tools.items()}

    def close(self, trajectory) -> None:
        self.toolbox.close(trajectory)

    def close_all(self) -> None:
        self.toolbox.close_all()


class DelayedLoop(AgentLoop):
    """An agent loop over a delayed toolbox."""

    def __init__(self, seconds: float, engine, chat, toolbox, args, lockstep: bool = False):
        super().__init__(engine, chat, DelayedToolbox(toolbox, seconds), args, lockstep)


# ------------------------------------------------------------------------------------------- ours


class Ours:
    """Our model, which learns from rollouts in either mode."""

    def __init__(self, args: PeerArgs, rollout_args: RolloutArgs, toolbox):
        self.temperature, tool_s = rollout_args.temperature, args.tool_ms / 1000
        self.model, tokenizer = load_policy("nano")
        self.chat = Chat(tokenizer, signatures())
        self.accelerator = Accelerator(cpu=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        engine = Engine(self.model, self.chat, rollout_args)
        self.loop = DelayedLoop(tool_s, engine, self.chat, toolbox, rollout_args, True)
        self.coming: list[Task] = []  # of the next asynchronous step
        self.pool = AsyncRollouts(
            self.model,
            Setup("nano", rollout_args, loop=functools.partial(DelayedLoop, tool_s)),
            args.threads or cores_of(1),
            self.next_group,
            args.trajectories // SAMPLES,
            AsyncArgs(),
        )

    def next_group(self, number: int, version: int):
        return new_group(self.coming.pop(0), number, SAMPLES, 0, version) if self.coming else None

    def play_async(self, tasks: list[Task], number: int) -> list[Trajectory]:
        self.pool.publish(self.model, number)  # the hand-over of the weights is part of the step
        self.coming.extend(tasks)
        return [t for group in self.pool.collect(number) for t in group.trajectories]

    def play_sync(self, tasks: list[Task], number: int) -> list[Trajectory]:
        self.loop.engine.new_weights(number)
        first = number * len(tasks)
        groups = [new_group(task, first + k, SAMPLES, 1) for k, task in enumerate(tasks)]
        return play(self.loop, [t for group in groups for t in group.trajectories])

    def step(self, play_tasks, tasks: list[Task], number: int) -> dict:
        """One step: rollouts, rewards, and an update over every sampled token.

        Args:
            play_tasks: `play_async` or `play_sync`.
            number: of the step, which is the version of its weights.
        """
        clock = time.perf_counter()
        trajectories = play_tasks(tasks, number)
        rollout_s = time.perf_counter() - clock
        rows = []
        for t in trajectories:
            # No advantage is 0, so that all trajectories are trained, as TRL does.
            advantage = correct(t.answer or "", t.task.answer, t.task.answer_type) - 0.5
            rows += rows_of(t, [advantage] * len(t.turns), number)
        policy, denominator = Policy(self.model, self.temperature), len(trajectories) * 128
        gradient(policy, self.accelerator, rows, denominator, TrainArgs())
        self.optimizer.step()
        self.optimizer.zero_grad()
        turns = [turn for t in trajectories for turn in t.turns]
        return {
            "rollout_s": rollout_s,
            "step_s": time.perf_counter() - clock,
            "turns": len(turns),
            "tokens": sum(len(turn.action_ids) for turn in turns),
            "calls": sum(len(turn.calls) for turn in turns),
        }

    def close(self) -> None:
        self.pool.close()
        self.loop.toolbox.close_all()


# ----------------------------------------------------------------------------------------- theirs

# The nano model's own format as TRL wants it: one template that also renders tool calls and tool
# results.
TRL_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>' + m['content'] + '</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% for c in m['tool_calls'] or [] %}"
    "{{ '<tool_call>' + (c['function'] | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
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


def prompt_of(task: Task) -> list[dict]:
    system = SYSTEM_PROMPT.format(signatures="; ".join(signatures()))
    return [{"role": "system", "content": system}, {"role": "user", "content": task.question}]


def trl_tools(shared: dict) -> list:
    """Our tools as functions with the docstrings that TRL reads. All trajectories share them."""

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

    return [search, browse, python]


def trl_reward(prompts, completions, answer, answer_type, **_) -> list[float]:
    texts = [completion[-1].get("content") or "" for completion in completions]
    texts = [text.split("<answer>")[-1].split("</answer>")[0] for text in texts]
    return [correct(text, truth, kind) for text, truth, kind in zip(texts, answer, answer_type)]


def open_trainer(tasks: list[Task], tools: list, args: PeerArgs, ours: Ours, folder: str):
    """TRL's trainer over the same model, tasks and tools.

    Raises:
        RuntimeError: its prompts would differ from ours.
    """
    import datasets
    import trl

    datasets.disable_progress_bars()
    model, tokenizer = load_policy("nano")
    tokenizer.chat_template, tokenizer.response_template = TRL_TEMPLATE, TRL_RESPONSE
    first = tokenizer.apply_chat_template(
        prompt_of(tasks[0]), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    if first != ours.chat.head(tasks[0].question):
        raise RuntimeError("TRL's first prompt differs from ours")
    limits = ours.loop.args
    config = trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        per_device_train_batch_size=args.trl_batch,
        gradient_accumulation_steps=args.trajectories // args.trl_batch,
        num_generations=SAMPLES,
        max_steps=args.pairs + 1,
        learning_rate=1e-6,
        beta=0.0,
        loss_type="dr_grpo",
        temperature=limits.temperature,
        max_completion_length=limits.max_context - len(ours.chat.before_question) - 32,
        max_tool_calling_iterations=limits.max_turns - 1,
    )
    lines = [
        {"prompt": prompt_of(t), "answer": t.answer, "answer_type": t.answer_type} for t in tasks
    ]
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=trl_reward,
        args=config,
        processing_class=tokenizer,
        tools=tools,
        train_dataset=datasets.Dataset.from_list(lines),
    )
    # This is a turn's limit, as ours; otherwise it would be the whole completion's.
    trainer.generation_config.max_new_tokens = limits.max_new_tokens
    return trainer


class Rounds(TrainerCallback):
    """Times TRL's steps from inside its trainer. Behind each of them, ours takes its two."""

    def __init__(self, trainer, tasks: list[Task], ours: Ours):
        self.ours, self.by_question = ours, {task.question: task for task in tasks}
        self.runs: list[dict] = []  # counted rounds
        self.generate, self.single_turn = trainer._generate, trainer._generate_single_turn
        trainer._generate, trainer._generate_single_turn = self.timed_generate, self.counted_turn
        trainer.add_callback(self)

    def timed_generate(self, prompts):
        self.theirs = {"turns": 0, "tokens": 0}
        clock = time.perf_counter()
        result = self.generate(prompts)
        self.theirs["rollout_s"] = time.perf_counter() - clock
        questions = dict.fromkeys(prompt[1]["content"] for prompt in prompts)
        self.tasks = [self.by_question[question] for question in questions]
        return result

    def counted_turn(self, *arguments, **options):
        result = self.single_turn(*arguments, **options)
        self.theirs["turns"] += len(result[0])
        self.theirs["tokens"] += sum(map(len, result[0]))
        return result

    def on_step_begin(self, *_, **__):
        self.clock = time.perf_counter()

    def on_step_end(self, trl_args, state, control, **_):
        run = {"trl": {"step_s": time.perf_counter() - self.clock, **self.theirs}}
        ours, number = self.ours, 2 * state.global_step
        run["ours"] = ours.step(ours.play_async, self.tasks, number)
        run["ours_sync"] = ours.step(ours.play_sync, self.tasks, number + 1)
        if state.global_step > 1:  # the first round warms up
            for name, side in (("", "ours"), ("_sync", "ours_sync")):
                for part in ("rollout", "step"):
                    seconds = run["trl"][f"{part}_s"], run[side][f"{part}_s"]
                    run[f"{part}_ratio{name}"] = seconds[0] / seconds[1]
            self.runs.append(run)
            print(format_run(run), flush=True)


def compare_with_trl(args: PeerArgs) -> dict:
    """Steps of TRL and of ours in turn.

    Returns:
        trl_rollout_ratio, trl_step_ratio: median over the pairs of TRL's seconds / our seconds with
            --rollout async.
        trl_rollout_ratio_sync, trl_step_ratio_sync: the same with --rollout sync.
        runs: each round's figures.

    Raises:
        ImportError: TRL is not installed; the message says how to install it.
        RuntimeError: the two sides did not see the same prompts, or TRL ran no tool.
    """
    try:
        import trl
    except ImportError as error:
        raise ImportError(
            f"the comparison with TRL needs it ({error}): pip install trl==1.16.0"
        ) from None
    warnings.filterwarnings("ignore")
    keep_memory()
    torch.set_num_threads(args.threads or cores_of(1))
    rollout_args = RolloutArgs(slots=args.trajectories)
    # One world, so that TRL's tools, which know no task, search the same pages.
    tasks = load_tasks(ROOT / "data" / "train.jsonl")
    world = tasks[0].meta["world"]
    tasks = [task for task in tasks if task.meta["world"] == world and task.hops]
    tasks = tasks[: args.trajectories // SAMPLES * (args.pairs + 1)]
    toolbox = Toolbox(rollout_args)
    toolbox.prepare(tasks)
    shared = DelayedToolbox(toolbox, args.tool_ms / 1000).tools_for(Trajectory(tasks[0], (0,)))
    ours = Ours(args, rollout_args, toolbox)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = open_trainer(tasks, trl_tools(shared), args, ours, folder)
            rounds = Rounds(trainer, tasks, ours)
            trainer.train()
    finally:
        ours.close()
    if all(run["trl"]["turns"] <= args.trajectories for run in rounds.runs):
        raise RuntimeError("TRL ran no tool: its parser did not understand the model's calls")
    keys = ("rollout_ratio", "step_ratio", "rollout_ratio_sync", "step_ratio_sync")
    medians = {f"trl_{key}": statistics.median(run[key] for run in rounds.runs) for key in keys}
    versions = {"trl": trl.__version__, "torch": torch.__version__}
    settings = versions | asdict(args) | {"threads": torch.get_num_threads()}
    del settings["json"]
    return medians | {"runs": rounds.runs, "settings": settings}


def format_run(run: dict) -> str:
    """One round as lines of text."""

    def line(title: str, side: str, name: str | None = None) -> str:
        s = run[side]
        times = f"rollout {s['rollout_s']:5.1f} s, step {s['step_s']:5.1f} s"
        text = f"{title:11s} {times}, {s['turns']:4d} turns, {s['tokens']:5d} tokens"
        if name is None:
            return text
        ratios = run[f"rollout_ratio{name}"], run[f"step_ratio{name}"]
        return f"{text}, ratio rollout {ratios[0]:.2f}, step {ratios[1]:.2f}"

    lines = ("TRL", "trl"), ("ours, async", "ours", ""), ("ours, sync", "ours_sync", "_sync")
    return "\n".join(line(*arguments) for arguments in lines)


def main():
    [args] = parse_flags((PeerArgs,), __doc__)
    if args.trajectories % SAMPLES or args.trajectories % args.trl_batch:
        sys.exit("bench_peer.py: --trajectories must be a multiple of 8 and of --trl_batch")
    try:
        result = compare_with_trl(args)
    except ImportError as error:
        sys.exit(f"bench_peer.py: {error}")
    medians = [f"{key} {value:.2f}" for key, value in result.items() if key.startswith("trl_")]
    print(f"median of {args.pairs}: " + ", ".join(medians))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
