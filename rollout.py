"""The agent loop and the generation engine: from tasks to trajectories.

`rollout` plays many trajectories at once. The `Engine` under it decodes them together with continuous batching: a slot a
trajectory, the KV cache of a trajectory kept across its turns (a turn costs its new tokens, not the whole context), a
finished slot refilled at once, and a slot that waits for a tool out of the batch.

In: a policy (any `AutoModelForCausalLM`), tasks. Out: `Trajectory` objects with token ids *as sampled*, their log-probs and
the segments that training sees. Nothing steers decoding: no grammar, no retries, plain sampling from softmax(logits / T).
To try an idea (another stop rule, another observation), change `finish_turn`.
"""

import concurrent.futures
import ctypes
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.cache_utils import Cache

from context import MANAGERS, Chat, Segment, extend_segments
from data.tasks import Task
from tools import FormatError, Toolbox, parse_action, run_calls, urls_in

NANO = Path(__file__).resolve().parent / "data" / "nano"
MAX_FAULTY_TURNS = 3  # in a row, before a trajectory is given up as the environment's failure


@dataclass
class RolloutArgs:
    """Flags that training and evaluation share: both go through `rollout`."""
    temperature: float = field(default=1.0, metadata={"help": "softmax temperature of sampling; training uses the same; 0 is greedy (evaluation only)"})
    max_turns: int = field(default=8, metadata={"help": "model steps before a trajectory ends as over_turns"})
    max_new_tokens: int = field(default=96, metadata={"help": "tokens in one turn; a turn that does not end by then is a format error"})
    max_context: int = field(default=1024, metadata={"help": "window in tokens; a prompt that leaves no room for a turn ends as over_context"})
    context: str = field(default="none", metadata={"help": f"context manager: {', '.join(MANAGERS)}"})
    context_budget: int = field(default=0, metadata={"help": "prompt tokens that make the context manager act (0: three quarters of the window)"})
    observation_tokens: int = field(default=192, metadata={"help": "tokens of tool results that one turn may add"})
    slots: int = field(default=64, metadata={"help": "trajectories decoded at once; KV memory is slots x max_context"})
    search_results: int = field(default=2, metadata={"help": "results a query"})
    page_chars: int = field(default=400, metadata={"help": "characters of a page that one browse call shows"})
    corpus: str = field(default="", metadata={"help": "index of your own (data/index.py) for tasks that name no world"})
    live: bool = field(default=False, metadata={"help": "let browse open public addresses of the real web"})
    tool_steps: int = field(default=8, metadata={"help": "tool results and new trajectories join at each so-many-th engine step: together, and at the same step whenever the seed is the same"})


def check_rollout_args(args: RolloutArgs) -> None:
    """Raises ValueError with one clear line for a flag that cannot work."""
    for name in ("max_turns", "max_new_tokens", "max_context", "observation_tokens", "slots", "search_results", "page_chars", "tool_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.temperature < float("inf") or args.context_budget < 0:
        raise ValueError("--temperature and --context_budget must be at least 0")
    if args.context not in MANAGERS:
        raise ValueError(f"--context {args.context}: choose {', '.join(MANAGERS)}")
    if args.max_new_tokens >= args.max_context:
        raise ValueError(f"--max_context {args.max_context} leaves no room for a prompt: it must be larger than --max_new_tokens {args.max_new_tokens}")


@dataclass
class Turn:
    """One model step."""
    action_ids: list[int]  # as sampled, the end-of-turn token included
    logprobs: list[float]  # of action_ids under the distribution sampled from
    version: int  # policy version that sampled them
    observation_ids: list[int] = field(default_factory=list)  # what followed
    calls: list[dict] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    faults: int = 0  # results that were the environment's failure
    generate_s: float = 0.0
    tool_s: float = 0.0


@dataclass
class Trajectory:
    """One attempt at one task. Plain data: it can be pickled at any turn boundary and continued elsewhere."""
    task: Task
    key: tuple[int, ...]  # (run seed, step, task, attempt): decides its random draws, whoever runs it
    head_ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    status: str = "running"  # answered, format_error, over_context, over_turns, tool_fault
    error: str = ""  # kind of format error
    answer: str | None = None
    memory: dict = field(default_factory=dict)  # the context manager's
    urls: list[str] = field(default_factory=list)  # seen in results or opened


def load_policy(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
    """A causal language model and its tokenizer.

    Args:
        name: "nano" (the shipped base model), a `save_pretrained` folder, a .gguf file, or a hub name.

    Raises:
        ValueError: it cannot be loaded; one line that says why.
    """
    path = NANO if name == "nano" else Path(name)
    try:
        if name.endswith(".gguf"):
            if not path.is_file():
                raise OSError("no such file")
            source, extra = str(path.parent), {"gguf_file": path.name}
        else:
            if path.exists() and not (path / "config.json").is_file():
                raise OSError("the folder has no config.json: give a checkpoint folder")
            source, extra = str(path) if path.exists() else name, {}
            if not path.exists() and (name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1):
                raise OSError("no such folder")  # it cannot be a hub name either
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa", **extra)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"cannot load the model {name!r}: {str(error).strip().splitlines()[0][:200]}") from None
    return model.to(device).eval(), tokenizer


def parse_flags(dataclasses: tuple, doc: str) -> list:
    """Command-line flags as instances of the dataclasses; a wrong flag ends the program with one line.

    Args:
        doc: the script's docstring; its first paragraph heads --help.
    """
    parser = HfArgumentParser(dataclasses, description=doc.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message} (see --help)")
    *parsed, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown flag {unknown[0]}")
    return parsed


def keep_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning them to the system: 1.2x faster training steps on a CPU."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        except OSError:
            pass


# -------------------------------------------------------------------------------------------------------------- engine

class SlotCache(Cache):
    """Keys and values of all slots, preallocated: one (slots, heads, length, size) tensor each a layer.

    A forward pass first says which rows it works on (`rows`, `positions`); `update` then writes the new tokens there and
    returns everything up to `length`. One extra column at the end takes what padding writes.
    """

    def __init__(self, slots: int, length: int):
        self.layers, self.slots, self.columns = [], slots, length + 1
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.rows = self.rows_tensor = self.positions = self.length = None

    def update(self, keys, values, layer_idx, *_, **__):
        if layer_idx == len(self.keys):  # the first pass shows the shape
            shape = (self.slots, keys.shape[1], self.columns, keys.shape[3])
            self.keys.append(keys.new_zeros(shape))
            self.values.append(values.new_zeros(shape))
        all_keys, all_values = self.keys[layer_idx], self.values[layer_idx]
        index = self.rows_tensor[:, None]  # (B, 1)
        all_keys[index, :, self.positions] = keys.transpose(1, 2)  # (B, T, heads, size)
        all_values[index, :, self.positions] = values.transpose(1, 2)
        rows = self.rows
        return all_keys[rows, :, :self.length], all_values[rows, :, :self.length]  # a view if `rows` is a slice

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always given

    def swap(self, a: int, b: int, length: int) -> None:
        for tensor in self.keys + self.values:
            kept = tensor[a, :, :length].clone()
            tensor[a, :, :length] = tensor[b, :, :length]
            tensor[b, :, :length] = kept

    def copy(self, source: int, target: int, length: int) -> None:
        for tensor in self.keys + self.values:
            tensor[target, :, :length] = tensor[source, :, :length]


@dataclass(eq=False)
class Slot:
    trajectory: Trajectory
    cached: list[int]  # ids whose keys and values are in this row of the cache
    pending: list[int] = field(default_factory=list)  # ids to run before the next token can be sampled
    ids: list[int] = field(default_factory=list)  # sampled in this turn
    logprobs: list[float] = field(default_factory=list)
    uniforms: np.ndarray | None = None  # random draws of this turn, one a token
    started: float = 0.0
    turn_done: bool = True


class Engine:
    """Decodes many trajectories together.

    Args:
        model: any causal LM of transformers with full attention; its weights may change between calls of `new_weights`.
        end_id: the token that ends a turn.
        slots, max_context, max_new_tokens, temperature: see RolloutArgs.
        shared_prefix: ids that all prompts begin with (the system prompt): computed once for each version of the weights.
    """

    def __init__(self, model, end_id: int, slots: int, max_context: int, max_new_tokens: int, temperature: float,
                 shared_prefix: list[int]):
        self.model, self.end_id, self.temperature = model, end_id, temperature
        self.max_new_tokens, self.max_context = max_new_tokens, max_context
        self.device = model.device
        self.cache = SlotCache(slots + 1, max_context)  # the last row holds the shared prefix
        self.slots: list[Slot | None] = [None] * slots
        self.shared_prefix, self.prefix_ready, self.version = shared_prefix, False, 0
        self.stats = {"decode_s": 0.0, "prefill_s": 0.0, "idle_s": 0.0, "sampled": 0, "prefilled": 0}

    def new_weights(self, version: int) -> None:
        """The model's weights have changed: every cached key and value is void."""
        self.version, self.prefix_ready = version, False
        for slot in filter(None, self.slots):
            slot.cached = []

    def free_slots(self) -> list[int]:
        return [row for row, slot in enumerate(self.slots) if slot is None]

    def start_turn(self, slot: Slot, row: int, prompt: list[int]) -> None:
        """Queue a prompt: what its slot has cached of it is not computed again."""
        if not self.prefix_ready:
            self.forward([self.shared_prefix], [0], slice(len(self.slots), len(self.slots) + 1))
            self.prefix_ready = True
        common = common_prefix(slot.cached, prompt)
        shared = common_prefix(self.shared_prefix, prompt)
        if shared > common:
            self.cache.copy(len(self.slots), row, shared)
            common = shared
        common = min(common, len(prompt) - 1)  # at least one token must run to give logits
        slot.cached, slot.pending = prompt[:common], prompt[common:]
        slot.ids, slot.logprobs, slot.turn_done, slot.started = [], [], False, time.perf_counter()
        slot.uniforms = np.random.default_rng([*slot.trajectory.key, len(slot.trajectory.turns)]).random(self.max_new_tokens)

    @torch.no_grad()
    def forward(self, chunks: list[list[int]], starts: list[int], rows) -> torch.Tensor:
        """Run new tokens of some rows through the model.

        Args:
            chunks: new ids of each row. starts: position of the first. rows: a slice, or row numbers.

        Returns:
            Logits after each row's last token, (B, V), float32.
        """
        B, T = len(chunks), max(map(len, chunks))
        ids, positions = np.zeros((B, T), dtype=np.int64), np.zeros((B, T), dtype=np.int64)
        targets = np.full((B, T), self.cache.columns - 1)  # padding writes to the extra column
        for b, (chunk, start) in enumerate(zip(chunks, starts)):
            ids[b, :len(chunk)] = chunk
            positions[b] = np.minimum(np.arange(start, start + T), start + len(chunk) - 1)
            targets[b, :len(chunk)] = np.arange(start, start + len(chunk))
        positions = torch.from_numpy(positions).to(self.device)
        length = int(positions.max()) + 1
        cache = self.cache
        cache.rows = rows if isinstance(rows, slice) else torch.tensor(rows, device=self.device)
        cache.rows_tensor = torch.arange(rows.start, rows.stop, device=self.device) if isinstance(rows, slice) else cache.rows
        cache.positions, cache.length = torch.from_numpy(targets).to(self.device), length
        # (B, 1, T, length), 0 where a token sees and -inf where not: made once, and not from a bool mask in each layer
        mask = torch.zeros(B, 1, T, length, device=self.device).masked_fill_(
            torch.arange(length, device=self.device) > positions[:, None, :, None], -torch.inf)
        last = torch.tensor([len(chunk) - 1 for chunk in chunks], device=self.device)
        wanted, where = torch.unique(last, return_inverse=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(input_ids=torch.from_numpy(ids).to(self.device), position_ids=positions, attention_mask=mask,
                                past_key_values=cache, use_cache=True, logits_to_keep=wanted).logits  # (B, distinct ends, V)
        return logits[torch.arange(B, device=self.device), where].float()

    def step(self) -> list[Slot]:
        """One token for every slot that is in the middle of a turn; returns the slots whose turn ended."""
        clock = time.perf_counter()
        pending = sorted((row for row, slot in enumerate(self.slots) if slot and slot.pending), key=lambda row: len(self.slots[row].pending))
        decoding = [row for row, slot in enumerate(self.slots) if slot and not slot.turn_done and not slot.pending]
        ended = []
        for first in range(0, len(pending), 16):  # rows of like length run together
            rows = pending[first:first + 16]
            logits = self.forward([self.slots[r].pending for r in rows], [len(self.slots[r].cached) for r in rows], rows)
            for row in rows:
                slot = self.slots[row]
                self.stats["prefilled"] += len(slot.pending)
                slot.cached, slot.pending = slot.cached + slot.pending, []
            ended += self.sample(logits, [self.slots[row] for row in rows])
        self.stats["prefill_s"] += time.perf_counter() - clock
        if decoding:
            clock = time.perf_counter()
            count = len(decoding)
            # Decoding rows come first, so that the cache is read without a copy: the last ones fill the gaps at the front.
            gaps = sorted(set(range(count)) - set(decoding))
            for gap, row in zip(gaps, decoding[len(decoding) - len(gaps):]):
                a, b = self.slots[gap], self.slots[row]
                self.cache.swap(gap, row, max(len(slot.cached) for slot in (a, b) if slot))
                self.slots[gap], self.slots[row] = b, a
            active = self.slots[:count]
            logits = self.forward([[slot.ids[-1]] for slot in active], [len(slot.cached) for slot in active], slice(0, count))
            for slot in active:
                slot.cached.append(slot.ids[-1])
            ended += self.sample(logits, active)
            self.stats["decode_s"] += time.perf_counter() - clock
        return ended

    def sample(self, logits: torch.Tensor, slots: list[Slot]) -> list[Slot]:
        """Draw a token for each slot from softmax(logits / T) by inverting the CDF (torch.multinomial takes ten times as
        long); returns the slots whose turn ended."""
        logprobs = torch.log_softmax(logits / (self.temperature or 1.0), dim=-1)  # (B, V)
        if self.temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            cumulative = logprobs.exp().cumsum(-1)
            u = torch.tensor([slot.uniforms[len(slot.ids)] for slot in slots], dtype=torch.float32, device=logits.device)[:, None]
            tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1)
        chosen = logprobs.gather(-1, tokens)[:, 0].tolist()
        ended = []
        for slot, token, logprob in zip(slots, tokens[:, 0].tolist(), chosen):
            slot.ids.append(token)
            slot.logprobs.append(logprob)
            self.stats["sampled"] += 1
            if token == self.end_id or len(slot.ids) == self.max_new_tokens:
                slot.turn_done = True
                ended.append(slot)
        return ended


def common_prefix(a: list[int], b: list[int]) -> int:
    """Number of leading ids that two lists share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


# ---------------------------------------------------------------------------------------------------------- agent loop

def trajectory_key(seed: int, step: int, task: Task, attempt: int) -> tuple[int, ...]:
    return seed, step, zlib.crc32(task.id.encode()), attempt


def next_prompt(trajectory: Trajectory, chat: Chat, args: RolloutArgs) -> list[int] | None:
    """The context manager's prompt for the next turn, or None if the trajectory ends here (status says why)."""
    budget = args.context_budget or args.max_context * 3 // 4
    prompt = MANAGERS[args.context](trajectory, chat, budget)
    if len(trajectory.turns) >= args.max_turns:
        trajectory.status = "over_turns"
    elif len(prompt) + args.max_new_tokens > args.max_context:
        trajectory.status = "over_context"
    else:
        extend_segments(trajectory.segments, prompt)
        return prompt
    return None


def finish_turn(trajectory: Trajectory, ids: list[int], logprobs: list[float], version: int, chat: Chat, tools: dict) -> list | None:
    """Record what was sampled and read the action; returns the tool calls to run, or None if the trajectory has ended."""
    trajectory.segments[-1].append(ids, len(trajectory.turns), logprobs)
    turn = Turn(ids, logprobs, version)
    trajectory.turns.append(turn)
    try:
        if ids[-1] != chat.end_id:
            raise FormatError("unfinished", "the turn was cut at its token limit")
        calls, answer = parse_action(chat.decode(ids[:-1]), tools)
    except FormatError as error:
        trajectory.status, trajectory.error = "format_error", error.kind
        return None
    if answer is not None:
        trajectory.status, trajectory.answer = "answered", answer
        return None
    turn.calls = [{"name": call.name, "arguments": call.arguments} for call in calls]
    return calls


def take_results(trajectory: Trajectory, results: list[tuple[str, bool]], chat: Chat, args: RolloutArgs) -> None:
    """Append tool results to the last turn as its observation."""
    turn = trajectory.turns[-1]
    turn.results = [text for text, _ in results]
    turn.faults = sum(fault for _, fault in results)
    turn.observation_ids = chat.observation(turn.results, args.observation_tokens) if chat else []
    for call, text in zip(turn.calls, turn.results):
        opened = [call["arguments"]["url"]] if call["name"] == "browse" else []
        trajectory.urls += [url for url in opened + urls_in(text) if url not in trajectory.urls]
    if len(trajectory.turns) >= MAX_FAULTY_TURNS and all(t.faults for t in trajectory.turns[-MAX_FAULTY_TURNS:]):
        trajectory.status = "tool_fault"


def rollout(engine: Engine, chat: Chat, trajectories: list[Trajectory], toolbox: Toolbox, args: RolloutArgs, on_finish=None) -> list[Trajectory]:
    """Play all trajectories to their end (sync mode) and return them in the order given.

    Tool results and new trajectories join at every `args.tool_steps`-th engine step (the engine waits for late results), so
    prompts are computed in large batches, and batches, and with them every last bit of the log-probs, do not depend on how
    fast a tool happened to be.

    Args:
        engine, chat: the policy.
        trajectories: fresh ones, or parked ones to continue.
        toolbox: gives each trajectory its tools.
        on_finish: called with each finished trajectory, for a progress bar.
    """
    queue = list(reversed(trajectories))
    waiting: list[tuple[Slot, float, concurrent.futures.Future]] = []  # (slot, since, results)
    step = 0

    def end(slot: Slot) -> None:
        engine.slots[engine.slots.index(slot)] = None
        toolbox.close(slot.trajectory)
        if on_finish:
            on_finish(slot.trajectory)

    def go_on(slot: Slot) -> None:
        prompt = next_prompt(slot.trajectory, chat, args)
        if prompt is None:
            end(slot)
        else:
            engine.start_turn(slot, engine.slots.index(slot), prompt)

    pool = concurrent.futures.ThreadPoolExecutor(max_workers=16, thread_name_prefix="tools")
    try:
        while queue or waiting or any(engine.slots):
            joining = step % args.tool_steps == 0
            for row in engine.free_slots() if joining else []:
                if not queue:
                    break
                trajectory = queue.pop()
                trajectory.head_ids = trajectory.head_ids or chat.head(trajectory.task.question)
                engine.slots[row] = Slot(trajectory, cached=[])
                go_on(engine.slots[row])
            while joining and waiting:
                slot, since, future = waiting.pop(0)
                clock = time.perf_counter()
                results = future.result()
                engine.stats["idle_s"] += time.perf_counter() - clock
                take_results(slot.trajectory, results, chat, args)
                slot.trajectory.turns[-1].tool_s = time.perf_counter() - since
                if slot.trajectory.status == "running":
                    go_on(slot)
                else:
                    end(slot)
            ended = engine.step()
            step += 1
            if all(slot.turn_done for slot in filter(None, engine.slots)):
                step = -(-step // args.tool_steps) * args.tool_steps  # nothing to decode: go straight to the next join
            for slot in ended:
                trajectory = slot.trajectory
                tools = toolbox.tools_for(trajectory)
                calls = finish_turn(trajectory, slot.ids, slot.logprobs, engine.version, chat, tools)
                trajectory.turns[-1].generate_s = time.perf_counter() - slot.started
                if calls is None:
                    end(slot)
                else:
                    waiting.append((slot, time.perf_counter(), pool.submit(run_calls, calls, tools)))
    finally:
        engine.slots = [None] * len(engine.slots)
        toolbox.close_all()
        pool.shutdown(wait=False, cancel_futures=True)
    return trajectories
