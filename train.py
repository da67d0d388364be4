"""REINFORCE for a research agent, end to end: read this file from top to bottom, it is the algorithm.

Each step: take some training tasks, play each several times with the current weights (rollout.py), reward the trajectories
(reward.py), and follow the policy gradient

    grad J = 1/N * sum over trajectories k, steps i, tokens t of  A(k, i) * grad log pi(token t | everything before it)

with A(k, i) = r_k * gamma**(T_k - i) - leave-one-out baseline, N constant, and only tokens that the current policy sampled.
No value network, no KL term, no clipping of ratios: data are used once, by the weights that sampled them.

In: a model, a task file. Out: runs/NAME/ with config.json, metrics.jsonl, curves.png, trajectories.jsonl, checkpoint/
(a plain save_pretrained folder) and state/ (for --resume). To try an idea, look for HACK HERE, in here and in reward.py.

    accelerate launch train.py
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from tqdm import tqdm

from context import Chat, Segment
from data.tasks import Task, load_tasks
from evaluate import format_table, make_trajectories, summarise
from reward import advantages, control_negatives, load_reward, step_rewards
from rollout import Engine, RolloutArgs, Trajectory, check_full_attention, keep_memory, load_policy, parse_flags, rollout, trajectory_key
from tools import SIGNATURES, Toolbox

DATA = Path(__file__).resolve().parent / "data"


@dataclass
class TrainArgs:
    model: str = field(default="nano", metadata={"help": "nano, a checkpoint folder, a .gguf file or a hub name"})
    train_tasks: str = field(default=str(DATA / "train.jsonl"), metadata={"help": "tasks to learn from"})
    dev_tasks: str = field(default=str(DATA / "dev.jsonl"), metadata={"help": "held-out tasks for the curve during training"})
    test_tasks: str = field(default=str(DATA / "test.jsonl"), metadata={"help": "held-out tasks for the figures before and after"})
    out: str = field(default="", metadata={"help": "folder of the run (default: runs/run-1, run-2, …)"})
    resume: str = field(default="", metadata={"help": "folder of a run to go on with; its own flags are used, but --steps may be given anew"})
    seed: int = field(default=0, metadata={"help": "decides every random choice"})
    steps: int = field(default=30, metadata={"help": "optimizer steps"})
    tasks_per_step: int = field(default=16, metadata={"help": "tasks in one step, over all processes"})
    samples: int = field(default=8, metadata={"help": "trajectories of one task: the group that gives the baseline"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate of AdamW; 1e-6 is usual for large models"})
    warmup: int = field(default=3, metadata={"help": "steps of linear warm-up"})
    decay_steps: int = field(default=30, metadata={"help": "steps over which the rate then falls to a tenth, along a line (0: constant)"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping"})
    gamma: float = field(default=0.95, metadata={"help": "decay of a correct trajectory's reward a step; 1 turns it off"})
    format_penalty: float = field(default=0.5, metadata={"help": "cost of a format failure"})
    negatives: float = field(default=2.0, metadata={"help": "incorrect trajectories kept for each correct one of the same task; inf keeps all"})
    reward: str = field(default="", metadata={"help": "file.py:function, a reward of your own"})
    nominal_tokens: int = field(default=128, metadata={"help": "sampled tokens a trajectory, for the constant denominator of the loss"})
    micro_tokens: int = field(default=4096, metadata={"help": "padded tokens in one forward and backward pass"})
    stale: str = field(default="mask", metadata={"help": "mask: only turns sampled by the current weights reach the loss"})
    check_logprobs: bool = field(default=False, metadata={"help": "before each update compare trainer and sampler log-probs; stop if they differ by more than 1e-4"})
    eval_every: int = field(default=10, metadata={"help": "steps between evaluations on dev (0: never)"})
    eval_tasks: int = field(default=128, metadata={"help": "test tasks before and after, half as many dev tasks in between (0: no evaluation)"})
    save_every: int = field(default=10, metadata={"help": "steps between checkpoints"})
    threads: int = field(default=0, metadata={"help": "CPU threads of each process (0: the cores, divided by the processes)"})
    log_with: str = field(default="", metadata={"help": "tracker of Accelerate: tensorboard, wandb, …"})


# ------------------------------------------------------------------------------------------------------------ learning

class Policy(torch.nn.Module):
    """The model as the loss sees it, in one module, so that Accelerate can wrap it."""

    def __init__(self, model, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Log-probs of chosen tokens given what stands before them.

        Args:
            ids: (B, T), padded on the right; causal attention needs no mask then.
            wanted: (B, T) bool, the tokens in the loss; never the first of a row.

        Returns:
            (number of wanted tokens,): log-probs under softmax(logits / temperature), the distribution sampled from.
        """
        hidden = self.model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # (B, T-1, D)
        picked = wanted[:, 1:]
        logits = self.model.get_output_embeddings()(hidden[picked]).float() / self.temperature  # (wanted, V): only where needed
        return torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:][picked][:, None])[:, 0]


@dataclass
class Row:
    """A segment with the advantage of each of its tokens; 0 means not in the loss."""
    segment: Segment
    weights: list[float]


def rows_of(trajectory: Trajectory, step_advantages: list[float], version: int) -> list[Row]:
    """The rows that training sees of a trajectory.

    Prompt and observation tokens (turn -1) and turns of older policy versions get no weight. A turn that stands in several
    segments (the context manager opened a new one) is trained only in the segment where it was sampled.
    """
    rows = []
    for segment in trajectory.segments:
        weights = [step_advantages[turn] if turn >= 0 and trajectory.turns[turn].version == version else 0.0 for turn in segment.turn_of]
        if any(weights):
            rows.append(Row(segment, weights))
    return rows


def micro_batches(rows: list[Row], micro_tokens: int) -> list[list[Row]]:
    """Rows of like length together, at most `micro_tokens` padded tokens each: the padding of a mixed batch is half of it."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.segment.ids)):
        if batches and (len(batches[-1]) + 1) * len(row.segment.ids) <= micro_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def collate(rows: list[Row], device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, weights), both (B, T), padded with zeros on the right."""
    T = max(len(row.segment.ids) for row in rows)
    ids, weights = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T)
    for b, row in enumerate(rows):
        ids[b, :len(row.segment.ids)] = torch.tensor(row.segment.ids)
        weights[b, :len(row.weights)] = torch.tensor(row.weights)
    return ids.to(device), weights.to(device)


def update(policy, optimizer, accelerator: Accelerator, rows: list[Row], denominator: float, args: TrainArgs) -> float | None:
    """One REINFORCE step over this process's rows; gradients are summed over processes.

    Returns:
        The gradient's norm before clipping, or None if it was not finite and the step was skipped.
    """
    batches = micro_batches(rows, args.micro_tokens)
    # Every process has to run as many backward passes as the one with most: missing ones are passes with weight 0.
    count = int(accelerator.gather(torch.tensor([len(batches)], device=accelerator.device)).max())
    if count == 0:
        return 0.0
    for number in range(count):
        if number < len(batches):
            ids, weights = collate(batches[number], accelerator.device)
            wanted = weights != 0
        else:
            ids, weights = torch.zeros(1, 2, dtype=torch.long, device=accelerator.device), torch.zeros(1, 2, device=accelerator.device)
            wanted = torch.tensor([[False, True]], device=accelerator.device)
        # Gradients travel between processes once, in the last pass.
        with contextlib.nullcontext() if number == count - 1 else accelerator.no_sync(policy):
            with accelerator.autocast():
                logprobs = policy(ids, wanted)
                # HACK HERE: the loss. J is maximised, hence the minus; x num_processes, for data parallelism takes the mean.
                loss = -(logprobs * weights[wanted]).sum() / denominator * accelerator.num_processes
            accelerator.backward(loss)
    norm = float(accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm if math.isfinite(norm) else None


@torch.no_grad()
def logprob_gap(policy, trajectories: list[Trajectory], micro_tokens: int, device) -> float:
    """Largest |trainer - sampler| over the log-probs of all sampled tokens. On-policy means this is rounding error."""
    gap = 0.0
    rows = [Row(segment, [float(turn >= 0) for turn in segment.turn_of]) for t in trajectories for segment in t.segments]
    for batch in micro_batches(rows, micro_tokens):
        ids, weights = collate(batch, device)
        sampled = torch.tensor([value for row in batch for value, weight in zip(row.segment.logprobs, row.weights) if weight], device=device)
        if len(sampled):
            gap = max(gap, float((policy(ids, weights != 0) - sampled).abs().max()))
    return gap


# -------------------------------------------------------------------------------------------------------- bookkeeping

def tasks_of_step(tasks: list[Task], step: int, count: int, seed: int) -> list[Task]:
    """The tasks of a step (from 0): each epoch is a new permutation, so a resumed run draws the same ones."""
    order = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(tasks))
        if not order or order[0] != epoch:
            order = [epoch, np.random.default_rng([seed, epoch]).permutation(len(tasks))]
        yield tasks[order[1][index]]


def learning_rate_at(step: int, args: TrainArgs) -> float:
    """Linear warm-up, then linear decay to a tenth at `decay_steps`. It does not look at --steps, so a resumed run may be longer."""
    decayed = 1 - 0.9 * min(1.0, step / args.decay_steps) if args.decay_steps else 1.0
    return args.learning_rate * min(1.0, (step + 1) / args.warmup) * decayed


def save_atomically(folder: Path, write) -> None:
    """`write(temporary folder)`, then put it in the place of `folder`: whoever reads sees the old one or the new one."""
    temporary, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its space back
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def save(out: Path, step: int, policy, optimizer, chat: Chat) -> None:
    """Write checkpoint/ (for users) and state/ (for --resume); the last two states are kept, in case one is damaged."""
    model = policy.model
    save_atomically(out / "checkpoint", lambda folder: (model.save_pretrained(folder), chat.tokenizer.save_pretrained(folder)))
    (out / "state").mkdir(exist_ok=True)
    temporary = out / "state" / "saving"
    try:
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, out / "state" / f"step-{step:06d}.pt")
    for old in sorted((out / "state").glob("step-*.pt"))[:-2]:
        old.unlink()


def load_state(out: Path) -> dict:
    """The newest whole state of a run.

    Raises:
        FileNotFoundError: there is none.
    """
    for path in sorted((out / "state").glob("step-*.pt"), reverse=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            print(f"{path} is damaged ({type(error).__name__}): trying the one before", file=sys.stderr)
    raise FileNotFoundError(f"--resume: no whole state in {out}/state; start anew with --out")


def cut_lines(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step` from a JSON-lines file: those steps will be done again."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}") and json.loads(line)["step"] <= last_step]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def draw_curves(out: Path) -> None:
    """curves.png from metrics.jsonl and evaluations.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()] if (out / "evaluations.jsonl").exists() else []
    steps = [m["step"] for m in metrics]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    axes[0, 0].plot(steps, [m["pass_rate"] for m in metrics], alpha=0.5, label="training tasks, each step")
    for split, style in (("dev", "o-"), ("test", "s")):
        points = [(e["step"], e["pass@1"], e["pass@1_ci"]) for e in held_out if e["split"] == split]
        if points:
            x, y, intervals = zip(*points)
            errors = [[v - low for v, (low, _) in zip(y, intervals)], [high - v for v, (_, high) in zip(y, intervals)]]
            axes[0, 0].errorbar(x, y, yerr=errors, fmt=style, capsize=3, label=f"held-out {split} tasks, 95% interval")
    axes[0, 0].set_title("Pass@1")
    axes[0, 0].set_ylim(0, 1)
    axes[0, 0].legend(fontsize=8)
    for axis, key, title in ((axes[0, 1], "turns", "turns a trajectory"), (axes[1, 0], "entropy", "entropy of the policy, nats a token"),
                             (axes[1, 1], "reward", "mean reward")):
        axis.plot(steps, [m[key] for m in metrics])
        axis.set_title(title)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(out / "curves.png.new", dpi=100, format="png")
    os.replace(out / "curves.png.new", out / "curves.png")
    plt.close(figure)


def choose_folder(args: TrainArgs) -> Path:
    """--resume's folder, --out, or the first free runs/run-N.

    Raises:
        ValueError: --out holds another run.
    """
    if args.resume:
        return Path(args.resume)
    if args.out:
        if (Path(args.out) / "metrics.jsonl").exists():
            raise ValueError(f"--out {args.out} holds a run: go on with it by --resume {args.out}, or choose another folder")
        return Path(args.out)
    number = 1
    while (Path("runs") / f"run-{number}").exists():
        number += 1
    return Path("runs") / f"run-{number}"


def start_ranks() -> None:
    """`accelerate launch --num_processes N` starts N processes on GPUs, but a single one on a CPU without MPI. Then this
    process turns into torch's own launcher, which starts this script N times (gloo)."""
    if "RANK" in os.environ or "PMI_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ or torch.cuda.is_available():
        return
    parent = psutil.Process().parent()
    words = " ".join(parent.cmdline() if parent else []).split(sys.argv[0])[0].replace("num-processes", "num_processes").replace("=", " ").split()
    count = words[words.index("--num_processes") + 1] if "--num_processes" in words[:-1] else "1"
    if count.isdigit() and int(count) > 1:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *sys.argv])


def use_threads(threads: int, processes: int) -> None:
    """All cores, shared by the processes of this machine: accelerate's launcher would leave it at one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // processes))


def check_args(args: TrainArgs, rollout_args: RolloutArgs) -> None:
    """Raises ValueError with one clear line for a flag that cannot work."""
    if args.stale != "mask":
        raise ValueError(f"--stale {args.stale}: only 'mask' (strictly on-policy) exists so far")
    if rollout_args.temperature <= 0:
        raise ValueError("--temperature must be above 0 in training: greedy decoding has no log-probs to learn from")
    for name in ("steps", "tasks_per_step", "samples", "micro_tokens", "save_every", "warmup"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1")
    if not 0 < args.gamma <= 1:
        raise ValueError("--gamma must be above 0 and at most 1")


# ---------------------------------------------------------------------------------------------------------------- main

def main():
    args, rollout_args = parse_flags((TrainArgs, RolloutArgs), __doc__)
    start_ranks()
    keep_memory()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=args.log_with or None, mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device, is_main = accelerator.device, accelerator.is_main_process
    use_threads(args.threads, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        out = choose_folder(args)
        state = None
        if args.resume:
            if not (out / "config.json").is_file():
                raise ValueError(f"--resume {out}: no run there")
            config, given = json.loads((out / "config.json").read_text()), {a.split("=")[0].lstrip("-") for a in sys.argv[1:] if a.startswith("--")}
            for part in (args, rollout_args):
                for key in asdict(part):
                    if key in config and key not in given:
                        setattr(part, key, config[key])
            state = load_state(out)
        check_args(args, rollout_args)
        train_tasks = load_tasks(args.train_tasks)
        test_tasks = load_tasks(args.test_tasks)[:args.eval_tasks] if args.eval_tasks else []
        dev_tasks = load_tasks(args.dev_tasks)[:args.eval_tasks // 2] if args.eval_tasks and args.eval_every else []
        reward_of = load_reward(args.reward)
        model, tokenizer = load_policy(args.model, device)
        check_full_attention(model, rollout_args.max_context)
        chat = Chat(tokenizer, SIGNATURES)
        toolbox = Toolbox(rollout_args.corpus, rollout_args.live, rollout_args.search_results, rollout_args.page_chars)
        with accelerator.main_process_first():  # one process writes the worlds, the others find them
            toolbox.prepare(train_tasks + test_tasks + dev_tasks)
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    set_seed(args.seed)
    if state:
        model.load_state_dict(state["model"])
    policy = Policy(model, rollout_args.temperature)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    first_step = 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    # The sampler uses the learner's own weights: on-policy by construction, and nothing to copy.
    engine = Engine(model, chat.end_id, rollout_args.slots, rollout_args.max_context, rollout_args.max_new_tokens,
                    rollout_args.temperature, chat.before_question, rollout_args.kv_tokens)
    engine.new_weights(first_step)
    if args.log_with:
        accelerator.init_trackers("nano-researcher", config=asdict(args) | asdict(rollout_args))
    if is_main:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "trajectories.jsonl", "evaluations.jsonl"):
            cut_lines(out / name, first_step)
        (out / "config.json").write_text(json.dumps(asdict(args) | asdict(rollout_args), indent=1))
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_tasks)} training tasks, run folder {out}")

    def play(trajectories: list[Trajectory], title: str) -> list[Trajectory]:
        """Play this process's trajectories to their end, with a progress bar."""
        with tqdm(total=len(trajectories), desc=title, unit="trajectory", leave=False, disable=not is_main, mininterval=0.5) as bar:
            return rollout(engine, chat, trajectories, toolbox, rollout_args, on_finish=lambda _: bar.update())

    def evaluate_on(split: str, tasks: list[Task], step: int) -> dict | None:
        mine = tasks[accelerator.process_index::accelerator.num_processes]
        played = gather_object(play(make_trajectories(mine, 1, args.seed, 1_000_000), f"evaluate on {split}"))
        result = summarise(played, {"step": step, "split": split}, args.seed)
        if is_main:
            with open(out / "evaluations.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "split": split} | result) + "\n")
            accelerator.log({f"{split}/pass@1": result["pass@1"]}, step=step)
        return result

    def stop(number, frame):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)

    before = after = None
    done, skipped, updating = first_step, 0, False
    try:
        if test_tasks and first_step == 0:
            before = evaluate_on("test", test_tasks, 0)
            if is_main:
                print(f"before training: held-out Pass@1 {before['pass@1']:.1%} (95% interval "
                      f"{before['pass@1_ci'][0]:.1%} to {before['pass@1_ci'][1]:.1%}, {before['n']} test tasks)", flush=True)
        progress = tqdm(range(first_step, args.steps), desc="train", initial=first_step, total=args.steps, disable=not is_main)
        for step in progress:
            # 1. Rollouts: every task of the step several times, by the current weights.
            clock = time.perf_counter()
            tasks = list(tasks_of_step(train_tasks, step, args.tasks_per_step, args.seed))[accelerator.process_index::accelerator.num_processes]
            trajectories = [Trajectory(task, trajectory_key(args.seed, step, task, attempt)) for task in tasks for attempt in range(args.samples)]
            idle_before = engine.stats["idle_s"]
            play(trajectories, "rollout")
            rollout_s, idle_s = time.perf_counter() - clock, engine.stats["idle_s"] - idle_before
            if args.check_logprobs:
                gap = logprob_gap(accelerator.unwrap_model(policy), trajectories, args.micro_tokens, device)
                print(f"step {step + 1}: largest |trainer - sampler| log-prob {gap:.1e}", flush=True)
                if gap > 1e-4 and device.type == "cpu":
                    sys.exit("train.py: trainer and sampler disagree by more than 1e-4: the data would not be on-policy")

            # 2. Rewards and advantages, group by group; some negatives are discarded after they informed the baseline.
            clock = time.perf_counter()
            rows, outcomes, negatives, kept_negatives = [], [], 0, 0
            for first in range(0, len(trajectories), args.samples):
                group = [t for t in trajectories[first:first + args.samples] if t.status != "tool_fault"]
                rewards = [reward_of(t, args.format_penalty) if not args.reward else reward_of(t) for t in group]
                steps_of = [step_rewards(r, len(t.turns), args.gamma) for r, t in zip(rewards, group)]
                kept = control_negatives(rewards, args.negatives)
                for t, advantage, keep in zip(group, advantages(steps_of), kept):
                    if keep:
                        rows += rows_of(t, advantage, engine.version)
                outcomes += rewards
                negatives += sum(r.total <= 0 for r in rewards)
                kept_negatives += sum(keep and r.total <= 0 for r, keep in zip(rewards, kept))

            # 3. The update. The denominator is a constant: no trajectory counts less because it, or another, is long.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, args)
            denominator = args.tasks_per_step * args.samples * args.nominal_tokens
            updating = True
            norm = update(policy, optimizer, accelerator, rows, denominator, args)
            updating = False
            done = step + 1
            engine.new_weights(done)
            train_s = time.perf_counter() - clock
            skipped = skipped + 1 if norm is None else 0
            if norm is None and is_main:
                print(f"step {done}: the gradient is not finite; the step was skipped", flush=True)
            if skipped == 3:
                sys.exit("train.py: three steps in a row without a finite gradient: lower --learning_rate")

            # 4. Bookkeeping.
            turns = [turn for t in trajectories for turn in t.turns]
            sampled = [-p for turn in turns for p in turn.logprobs]  # its mean is an unbiased estimate of the entropy
            local = {"trajectories": len(trajectories), "reward": sum(o.total for o in outcomes), "outcomes": len(outcomes),
                     "right": sum(o.correct for o in outcomes), "turns": len(turns), "tokens": len(sampled), "surprise": sum(sampled),
                     "negatives": negatives, "kept": kept_negatives, "rollout_s": rollout_s, "idle_s": idle_s,
                     "stale": sum(len(turn.action_ids) for turn in turns if turn.version != done - 1),
                     "status": dict(Counter(t.status for t in trajectories)), "error": dict(Counter(t.error for t in trajectories if t.error))}
            parts = gather_object([local])
            total = {key: sum(part[key] for part in parts) for key in local if key not in ("status", "error")}
            status = sum((Counter(part["status"]) for part in parts), Counter())
            metrics = {
                "step": done, "reward": total["reward"] / max(1, total["outcomes"]), "pass_rate": total["right"] / total["trajectories"],
                "turns": total["turns"] / total["trajectories"], "tokens": total["tokens"] / total["trajectories"],
                "entropy": total["surprise"] / max(1, total["tokens"]), "kept_negatives": total["kept"] / max(1, total["negatives"]),
                "stale_share": total["stale"] / max(1, total["tokens"]), "parked": 0, "idle_share": total["idle_s"] / total["rollout_s"],
                "learning_rate": optimizer.param_groups[0]["lr"], "rollout_s": rollout_s, "train_s": train_s, "tokens_per_s": total["tokens"] / rollout_s, "grad_norm": norm,
                "status": dict(status), "format_errors": dict(sum((Counter(part["error"]) for part in parts), Counter()))}
            if is_main:
                with open(out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(metrics) + "\n")
                with open(out / "trajectories.jsonl", "a", encoding="utf-8") as file:
                    for t in trajectories[::args.samples]:
                        file.write(json.dumps({"step": done, "id": t.task.id, "question": t.task.question, "truth": t.task.answer,
                                               "answer": t.answer, "status": t.status, "error": t.error, "turns": len(t.turns),
                                               "text": chat.decode(t.segments[-1].ids)}) + "\n")
                progress.set_postfix({"pass": f"{metrics['pass_rate']:.2f}", "turns": f"{metrics['turns']:.1f}",
                                      "entropy": f"{metrics['entropy']:.2f}", "s": f"{rollout_s:.1f}+{train_s:.1f}"})
            accelerator.log({key: value for key, value in metrics.items() if isinstance(value, (int, float))}, step=done)
            if dev_tasks and done % args.eval_every == 0 and done < args.steps:
                evaluate_on("dev", dev_tasks, done)
            if is_main and (done % args.save_every == 0 or done == args.steps):
                save(out, done, accelerator.unwrap_model(policy), optimizer, chat)
                draw_curves(out)
        progress.close()
        if test_tasks:
            if dev_tasks:
                evaluate_on("dev", dev_tasks, done)
            after = evaluate_on("test", test_tasks, done)
            if is_main:
                draw_curves(out)
                print(format_table(after))
                start = f"{before['pass@1']:.1%} before, " if before else ""
                print(f"held-out Pass@1: {start}{after['pass@1']:.1%} after {done} steps ({after['n']} test tasks, one sample each; "
                      f"for more: python evaluate.py --model {out}/checkpoint)")
    except KeyboardInterrupt:
        if is_main and not updating and done > first_step:
            save(out, done, accelerator.unwrap_model(policy), optimizer, chat)
        sys.exit(f"train.py: stopped after step {done}; go on with: accelerate launch train.py --resume {out}" if is_main else 130)
    except OSError as error:
        sys.exit(f"train.py: {error.strerror or error} ({error.filename or out}); the last whole checkpoint is kept, go on with --resume {out}")
    finally:
        if args.log_with:
            accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
