"""The agent loop and the generation engine: from tasks to trajectories.

`play` is the agent loop: many trajectories at once, tools in threads beside it. The `Engine` under it decodes them together
with continuous batching: a slot a trajectory, the KV cache of a trajectory kept across its turns (a turn costs its new tokens,
not the whole context), a finished slot refilled at once, and a slot that waits for a tool out of the batch.

The same loop runs in the trainer (`rollout`, --rollout sync) and in rollout processes (workers.py, --rollout async):

    trainer                                             each worker
    -------                                             -----------
    queue of trajectories, whole groups, replay buffer  engine, tools in threads
        trajectories: new, then parked    -- pipe ->    free slots take them
        a step is full or over budget: hold  ------>    no turn is started any more; the turns under way end
        replay buffer of unfinished ones  <- pipe --    their state at the turn boundary, in one message
    reward, advantages, update
    new weights into shared memory, "go"  -- pipe ->    copied between turns, version and checksum compared;
                                                        held trajectories go on where they stopped
        finished trajectories             <- pipe --    each as it ends

Turn-level partial rollout is one condition in `play`: `if not holding()` before turns are started. A turn is atomic: all its
tokens come from one version of the weights, which is written in it. With --overlap nobody holds for the update: workers
stop at a turn boundary only to copy new weights.

In: a policy (any `AutoModelForCausalLM`), tasks. Out: `Trajectory` objects with token ids *as sampled*, their log-probs and
the segments that training sees. Nothing steers decoding: no grammar, no retries, plain sampling from softmax(logits / T).
To try an idea (another stop rule, another observation), change `finish_turn`.
"""

import concurrent.futures
import queue
import threading
import time
import zlib
from dataclasses import dataclass, field

from context import MANAGERS, Chat, Trajectory, Turn, extend_segments
from data.task import Task
from engine import Engine, Slot
from tools import FormatError, Toolbox, ToolCall, parse_action, run_calls, urls_in

MAX_FAULTY_TURNS = 3  # in a row, before a trajectory is given up as the environment's failure


@dataclass
class RolloutArgs:
    """Flags that training and evaluation share: both go through `rollout`."""

    temperature: float = field(
        default=1.0,
        metadata={
            "help": "softmax temperature of sampling; training uses the same; 0 is greedy (evaluation only)"
        },
    )
    max_turns: int = field(
        default=8, metadata={"help": "model steps before a trajectory ends as over_turns"}
    )
    max_new_tokens: int = field(
        default=96,
        metadata={"help": "tokens in one turn; a turn that does not end by then is a format error"},
    )
    max_context: int = field(
        default=1024,
        metadata={
            "help": "window in tokens; a prompt that leaves no room for a turn ends as over_context"
        },
    )
    context: str = field(
        default="none", metadata={"help": f"context manager: {', '.join(MANAGERS)}"}
    )
    context_budget: int = field(
        default=0,
        metadata={
            "help": "prompt tokens that make the context manager act (0: three quarters of the window)"
        },
    )
    observation_tokens: int = field(
        default=192, metadata={"help": "tokens of tool results that one turn may add"}
    )
    slots: int = field(default=64, metadata={"help": "trajectories in flight at once"})
    kv_tokens: int = field(
        default=0,
        metadata={
            "help": "KV memory in tokens, max_context for each row: fewer rows than slots evict trajectories that wait for tools (0: a row a slot)"
        },
    )
    search_results: int = field(default=2, metadata={"help": "results a query"})
    page_chars: int = field(
        default=400, metadata={"help": "characters of a page that one browse call shows"}
    )
    corpus: str = field(
        default="",
        metadata={"help": "index of your own (data/index.py) for tasks that name no world"},
    )
    live: bool = field(
        default=False, metadata={"help": "let browse open public addresses of the real web"}
    )
    search: str = field(
        default="embedded",
        metadata={
            "help": "embedded, searxng, brave, serper or tavily (keys: BRAVE_API_KEY, SERPER_API_KEY, TAVILY_API_KEY); all but embedded imply --live"
        },
    )
    search_url: str = field(
        default="", metadata={"help": "address of the search service: needed for searxng"}
    )
    unsafe_python: bool = field(
        default=False,
        metadata={"help": "run the python tool without its sandbox, where the machine has none"},
    )
    tool_steps: int = field(
        default=8,
        metadata={
            "help": "tool results and new trajectories join at each so-many-th engine step: together, and at the same step whenever the seed is the same"
        },
    )
    tool_timeout_s: float = field(
        default=60.0,
        metadata={
            "help": "seconds after which a turn's tool calls are given up; the policy sees an error, the trajectory is not punished"
        },
    )
    trajectory_timeout_s: float = field(
        default=3600.0,
        metadata={
            "help": "seconds of decoding and tools after which a trajectory ends as tool_fault"
        },
    )


def check_rollout_args(args: RolloutArgs) -> None:
    """Raises ValueError with one clear line for a flag that cannot work."""
    for name in (
        "max_turns",
        "max_new_tokens",
        "max_context",
        "observation_tokens",
        "slots",
        "search_results",
        "page_chars",
        "tool_steps",
    ):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.temperature < float("inf") or args.context_budget < 0:
        raise ValueError("--temperature and --context_budget must be at least 0")
    if args.context not in MANAGERS:
        raise ValueError(f"--context {args.context}: choose {', '.join(MANAGERS)}")
    most = (
        args.max_context - 2 * args.max_new_tokens - 64
    )  # behind a prompt within its budget: an action, the request for notes, the notes
    if args.context == "summarize" and (args.context_budget or args.max_context * 3 // 4) > most:
        raise ValueError(
            f"--context summarize needs room for an action and notes behind the prompt: --context_budget {most} or less, or a larger --max_context"
        )
    if args.max_new_tokens >= args.max_context:
        raise ValueError(
            f"--max_context {args.max_context} leaves no room for a prompt: it must be larger than --max_new_tokens {args.max_new_tokens}"
        )


def engine_for(model, chat: Chat, args: RolloutArgs) -> Engine:
    """The engine that plays with this model, chat template and these limits."""
    return Engine(
        model,
        chat.end_id,
        args.slots,
        args.max_context,
        args.max_new_tokens,
        args.temperature,
        chat.before_question,
        args.kv_tokens,
    )


def open_toolbox(args: RolloutArgs) -> Toolbox:
    """The tools that these flags ask for; raises as `Toolbox` does."""
    return Toolbox(
        args.corpus,
        args.live,
        args.search_results,
        args.page_chars,
        args.search,
        args.search_url,
        args.unsafe_python,
    )


# ---------------------------------------------------------------------------------------------------------- agent loop


def trajectory_key(seed: int, step: int, task: Task, attempt: int) -> tuple[int, ...]:
    return seed, step, zlib.crc32(task.id.encode()), attempt


def next_prompt(trajectory: Trajectory, chat: Chat, args: RolloutArgs) -> list[int] | None:
    """The context manager's prompt for the next turn, or None if the trajectory ends here (status says why)."""
    budget = args.context_budget or args.max_context * 3 // 4
    prompt = MANAGERS[args.context](trajectory, chat, budget)
    if len(trajectory.turns) >= args.max_turns:
        trajectory.status = "over_turns"
    elif (
        sum(turn.generate_s + turn.tool_s for turn in trajectory.turns) > args.trajectory_timeout_s
    ):
        trajectory.status = "tool_fault"  # left out, not punished: slowness is the environment's
    elif len(prompt) + args.max_new_tokens > args.max_context:
        trajectory.status = "over_context"
    else:
        extend_segments(trajectory.segments, prompt)
        return prompt
    return None


def finish_turn(
    trajectory: Trajectory,
    ids: list[int],
    logprobs: list[float],
    version: int,
    chat: Chat,
    tools: dict,
) -> list | None:
    """Record what was sampled and read the action; returns the tool calls to run (none after notes), or None if the trajectory has ended."""
    is_notes = len(trajectory.turns) in trajectory.memory.get("notes_turns", [])
    trajectory.segments[-1].append(ids, len(trajectory.turns), logprobs)
    turn = Turn(ids, logprobs, version)
    trajectory.turns.append(turn)
    try:
        if ids[-1] != chat.end_id:
            raise FormatError("unfinished", "the turn was cut at its token limit")
        if is_notes:  # free text, see context.summarize
            return []
        calls, answer = parse_action(chat.decode(ids[:-1]), tools)
    except FormatError as error:
        trajectory.status, trajectory.error = "format_error", error.kind
        return None
    if answer is not None:
        trajectory.status, trajectory.answer = "answered", answer
        return None
    turn.calls = [{"name": call.name, "arguments": call.arguments} for call in calls]
    return calls


def take_results(
    trajectory: Trajectory, results: list[tuple[str, bool]], chat: Chat, args: RolloutArgs
) -> None:
    """Append tool results to the last turn as its observation."""
    turn = trajectory.turns[-1]
    turn.results = [text for text, _ in results]
    turn.faults = sum(fault for _, fault in results)
    turn.observation_ids = chat.observation(turn.results, args.observation_tokens) if chat else []
    for call, text in zip(turn.calls, turn.results):
        opened = [call["arguments"]["url"]] if call["name"] == "browse" else []
        trajectory.urls += [url for url in opened + urls_in(text) if url not in trajectory.urls]
    called = [
        t for t in trajectory.turns if t.results
    ]  # a turn of notes between them calls nothing
    if len(called) >= MAX_FAULTY_TURNS and all(t.faults for t in called[-MAX_FAULTY_TURNS:]):
        trajectory.status = "tool_fault"


class ToolThreads:
    """Threads that run tool calls, at most `most`. One that hangs is given up, replaced, and cannot keep the process from ending."""

    def __init__(self, most: int):
        self.most, self.threads, self.busy = most, 0, 0
        self.jobs, self.lock, self.news = queue.SimpleQueue(), threading.Lock(), threading.Event()
        self.lost: set[concurrent.futures.Future] = set()

    def submit(self, function, *arguments) -> concurrent.futures.Future:
        future = concurrent.futures.Future()
        with self.lock:
            self.busy += 1
            if self.threads < min(self.busy, self.most):
                self.threads += 1
                threading.Thread(target=self.work, name="tools", daemon=True).start()
        self.jobs.put((future, function, arguments))
        return future

    def work(self) -> None:
        while (job := self.jobs.get()) is not None:
            future, function, arguments = job
            result = error = None
            try:
                result = function(*arguments)
            except Exception as exception:
                error = exception
            with self.lock:
                if future in self.lost:  # another thread has taken this one's place
                    self.lost.discard(future)
                    return
                self.busy -= 1
                future.set_exception(error) if error else future.set_result(result)
            self.news.set()

    def give_up(self, future: concurrent.futures.Future) -> None:
        with self.lock:
            if not future.done():
                self.lost.add(future)
                self.threads, self.busy = self.threads - 1, self.busy - 1

    def close(self) -> None:
        for _ in range(self.threads):
            self.jobs.put(None)


def run_turn(calls: list[ToolCall], tools: dict, replay: list[ToolCall]) -> list[tuple[str, bool]]:
    """Run one turn's calls.

    A Python session lives in one process, so a trajectory that was continued in another has lost its variables: the first
    turn that calls `python` there first repeats the code of all earlier turns, in order, and drops the output.
    """
    if replay:
        run_calls(replay, tools)
    return run_calls(calls, tools)


def play(
    engine: Engine,
    chat: Chat,
    toolbox: Toolbox,
    args: RolloutArgs,
    take,
    finish,
    holding=lambda: False,
    lockstep: bool = False,
    act=finish_turn,
) -> None:
    """The agent loop: plays trajectories until `take` has no more and all have ended.

    Tool results and new trajectories join at every `args.tool_steps`-th engine step, so prompts are computed in large batches.

    Args:
        take: take(n) gives at most n trajectories to start or to continue, or None when no more will come.
        finish: called with each trajectory that has ended.
        holding: asked at each join; while it is true no turn is started. This is all there is to partial rollout and to new
            weights: once no slot is in the middle of a turn, every trajectory is at a turn boundary.
        lockstep: a result joins at a step that follows from the step of its call alone: at the first join that is `tool_steps`
            steps or more after it (or the next one, if nothing is left to decode), and the engine waits for it there. Batches,
            and with them every last bit of the log-probs, then do not depend on how fast a tool happened to be (sync mode).
            Otherwise results join as they come.
        act: reads a finished turn, see `finish_turn`.
    """
    waiting: list[
        tuple[Slot, int, float, concurrent.futures.Future]
    ] = []  # (slot, step of the call, time of it, results)
    ready: list[Slot] = []  # at a turn boundary
    replays: dict[
        Slot, list[ToolCall]
    ] = {}  # python calls of trajectories that were begun elsewhere
    threads = ToolThreads(len(engine.slots))
    step, more = 0, True

    def start(row: int, trajectory: Trajectory) -> None:
        trajectory.head_ids = trajectory.head_ids or chat.head(trajectory.task.question)
        slot = engine.slots[row] = Slot(trajectory)
        cut_off = [
            turn for turn in trajectory.turns[-1:] if turn.calls and not turn.results
        ]  # parked before its tools had answered
        past = trajectory.turns[: len(trajectory.turns) - len(cut_off)]
        replays[slot] = [
            ToolCall(**call) for turn in past for call in turn.calls if call["name"] == "python"
        ]
        for turn in cut_off:
            run_tools(slot, [ToolCall(**call) for call in turn.calls])
        if not cut_off:
            ready.append(slot)

    def run_tools(slot: Slot, calls: list[ToolCall]) -> None:
        replay = replays.pop(slot, []) if any(call.name == "python" for call in calls) else []
        waiting.append(
            (
                slot,
                step,
                time.perf_counter(),
                threads.submit(run_turn, calls, toolbox.tools_for(slot.trajectory), replay),
            )
        )

    def end(slot: Slot) -> None:
        engine.slots[engine.slots.index(slot)] = None
        replays.pop(slot, None)
        toolbox.close(slot.trajectory)
        finish(slot.trajectory)

    try:
        while more or any(engine.slots):
            if step % args.tool_steps == 0:
                hold = holding()
                if more and not hold:
                    rows = engine.free_slots()
                    arrived = take(len(rows))
                    more = arrived is not None
                    for row, trajectory in zip(rows, arrived or []):
                        start(row, trajectory)
                decoding = any(slot and not slot.turn_done for slot in engine.slots)
                for call in list(waiting):
                    slot, called, since, future = call
                    if lockstep and decoding and step - called < args.tool_steps:
                        continue
                    if lockstep and not future.done():
                        clock = time.perf_counter()
                        concurrent.futures.wait(
                            [future], timeout=max(0.0, since + args.tool_timeout_s - clock)
                        )
                        engine.stats["idle_s"] += time.perf_counter() - clock
                    waited = time.perf_counter() - since
                    if not future.done() and waited < args.tool_timeout_s:
                        continue
                    waiting.remove(call)
                    threads.give_up(future)
                    trajectory = slot.trajectory
                    late = [(f"error: no answer within {args.tool_timeout_s:g} s", True)] * len(
                        trajectory.turns[-1].calls
                    )
                    take_results(trajectory, future.result() if future.done() else late, chat, args)
                    trajectory.turns[-1].tool_s = waited
                    if trajectory.status == "running":
                        ready.append(slot)
                    else:
                        end(slot)
                if not hold:
                    for slot in ready:
                        prompt = next_prompt(slot.trajectory, chat, args)
                        if prompt is None:
                            end(slot)
                        else:
                            engine.start_turn(slot, prompt)
                    ready.clear()
            if all(
                slot is None or slot.turn_done for slot in engine.slots
            ):  # nothing to decode: go straight to the next join
                step = -(-step // args.tool_steps) * args.tool_steps
                if not lockstep:
                    clock = time.perf_counter()
                    threads.news.wait(0.005)
                    threads.news.clear()
                    engine.stats["idle_s"] += time.perf_counter() - clock
                continue
            ended = engine.step()
            step += 1
            for slot in ended:
                trajectory = slot.trajectory
                calls = act(
                    trajectory,
                    slot.ids,
                    slot.logprobs,
                    engine.version,
                    chat,
                    toolbox.tools_for(trajectory),
                )
                trajectory.turns[-1].began, trajectory.turns[-1].generate_s = (
                    slot.started,
                    time.perf_counter() - slot.started,
                )
                if calls is None:
                    end(slot)
                elif calls:
                    run_tools(slot, calls)
                else:
                    ready.append(slot)
    finally:
        engine.slots = [None] * len(engine.slots)
        toolbox.close_all()
        threads.close()


def rollout(
    engine: Engine,
    chat: Chat,
    trajectories: list[Trajectory],
    toolbox: Toolbox,
    args: RolloutArgs,
    on_finish=None,
    act=finish_turn,
) -> list[Trajectory]:
    """Play all trajectories to their end in this process, in lockstep (sync mode), and return them in the order given.

    Args:
        engine, chat: the policy.
        trajectories: fresh ones, or parked ones to continue.
        toolbox: gives each trajectory its tools.
        on_finish: called with each finished trajectory, for a progress bar.
    """
    left = list(reversed(trajectories))
    play(
        engine,
        chat,
        toolbox,
        args,
        lockstep=True,
        act=act,
        finish=on_finish or (lambda trajectory: None),
        take=lambda n: [left.pop() for _ in range(min(n, len(left)))] if left else None,
    )
    return trajectories
