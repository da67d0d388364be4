"""The agent loop: from tasks to trajectories.

`AgentLoop` plays many trajectories at once. One turn of a trajectory goes through five methods:

    begin_turns    the context manager makes the next prompt, or the trajectory ends at a limit
    engine.step    one more token for every trajectory in the middle of a turn (engine.py)
    end_turn       what was sampled is read: an answer ends the trajectory, calls go to the tools
    run_tools      the calls run in a thread, while the engine decodes the others
    join_results   their results become the observation, and the trajectory is at a turn boundary

The same loop runs in the trainer (`SyncRollouts`) and in rollout processes; the docstring of
workers.py shows who sends what to whom. Turn-level partial rollout (`--partial`, in workers.py) is
`hold` in `step`: while it is true, no turn begins. A parked trajectory stays in its slot; only
after a lost worker or --resume does it come back through `add`. A turn is atomic: all its tokens
come from one version of the weights, which is written in it.

In: a policy behind an engine, tasks. Out: `Trajectory` objects with token ids *as sampled*, their
log-probs, and the segments that training sees.
To try an idea (another stop rule, another observation), change `next_prompt` or `observe`.
"""

import concurrent.futures
import copy
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

from transformers.hf_argparser import HfArg

from context import MANAGERS, Chat, Trajectory, Turn, add_turn, extend_segments
from data.task import Task
from engine import Engine, Slot
from support import endings
from support.threads import in_thread
from support.toolbox import Toolbox
from tools import FormatError, ToolCall, parse_action, run_calls, urls_in

MAX_FAULTY_TURNS = 3  # in a row, before a trajectory is given up as the environment's failure
SearchEngine = Literal["embedded", "searxng", "brave", "serper", "tavily"]
TRAINING, EVALUATION = 0, 1  # their random draws have nothing in common


@dataclass
class RolloutArgs:
    """Flags that training and evaluation share."""

    temperature: float = HfArg(default=1.0, help="of sampling and of the loss; 0: greedy")
    max_turns: int = HfArg(default=8, help="turns before a trajectory ends as over_turns")
    max_new_tokens: int = HfArg(default=96, help="tokens of a turn; a longer one is a format error")
    max_context: int = HfArg(default=1024, help="window in tokens; when it is full: over_context")
    context: str = HfArg(default="none", help=f"context manager: {', '.join(MANAGERS)}")
    context_budget: int = HfArg(default=0, help="prompt tokens it allows (0: 3/4 of the window)")
    observation_tokens: int = HfArg(default=192, help="tokens of tool results in one turn")
    slots: int = HfArg(default=64, help="trajectories in flight at once")
    engine: str = HfArg(default="", help="URL of a vLLM or SGLang server that decodes")
    engine_weights: str = HfArg(default="", help="folder for its weights, on a path it sees, too")
    kv_tokens: int = HfArg(default=0, help="KV memory in tokens (0: slots x max_context)")
    precision: Literal["auto", "bf16", "fp32"] = HfArg(default="auto", help="auto: bf16 on GPUs")
    tool_steps: int = HfArg(default=8, help="engine steps between two joins of tool results")
    tool_timeout_s: float = HfArg(default=60.0, help="limit for the calls of a turn, in seconds")
    trajectory_timeout_s: float = HfArg(default=3600.0, help="seconds in all; then tool_fault")
    search_results: int = HfArg(default=2, help="results a query")
    page_chars: int = HfArg(default=400, help="characters of a page that one browse call shows")
    corpus: str = HfArg(default="", help="index (data/index.py) for tasks that name no world")
    live: bool = HfArg(default=False, help="let browse open public addresses of the real web")
    search: SearchEngine = HfArg(default="embedded", help="any but embedded implies --live")
    search_url: str = HfArg(default="", help="address of the search service (searxng needs it)")
    python: Literal["monty", "cpython"] = HfArg(default="monty", help="cpython needs Linux")
    unsafe_python: bool = HfArg(default=False, help="cpython without its sandbox")


def budget_of(args: RolloutArgs) -> int:
    """Prompt tokens at which the context manager acts; behind them a turn must find room."""
    budget = args.context_budget or args.max_context * 3 // 4
    return min(budget, args.max_context - args.max_new_tokens)


# ------------------------------------------------------------------------------------------ groups


@dataclass
class Group:
    """The attempts at one task, whose rewards are compared with each other."""

    position: int  # of the task in the stream of tasks
    born: int  # version of the weights when the group was begun
    trajectories: list[Trajectory]

    def whole(self) -> bool:
        return all(t.status != "running" for t in self.trajectories)


def new_group(
    task: Task, position: int, samples: int, seed: int, version: int = 0, stream: int = TRAINING
) -> Group:
    """Fresh attempts at a task.

    The key of a trajectory decides its random draws, whoever plays it and whenever: (run seed,
    stream, position of the task, index in the group, times that it was lost with a worker). The
    engine adds the number of the turn, and draws one number a token.

    Args:
        position: of the task in its stream; a stream may hold the same task twice.
        version: of the weights now.
    """
    keys = [(seed, stream, position, index, 0) for index in range(samples)]
    return Group(position, version, [Trajectory(task, key) for key in keys])


# -------------------------------------------------------------------------------------- agent loop


@dataclass
class ToolRun:
    """The tool calls of one turn, which run in a thread."""

    slot: Slot
    step: int  # engine step at which they were made
    since: float  # time of that step, in seconds
    memory: dict  # a copy of the trajectory's, as the calls found it
    results: concurrent.futures.Future  # what `run_calls` gives


def next_prompt(trajectory: Trajectory, chat: Chat, args: RolloutArgs) -> list[int] | None:
    """The context manager's prompt for the next turn, or None if the trajectory ends at a limit;
    its status then says at which.
    """
    prompt = MANAGERS[args.context](trajectory, chat, budget_of(args))
    seconds = sum(turn.generate_s + turn.tool_s for turn in trajectory.turns)
    if len(trajectory.turns) >= args.max_turns:
        trajectory.status = "over_turns"
    elif seconds > args.trajectory_timeout_s:
        trajectory.status = "tool_fault"  # nobody is punished for time
    elif len(prompt) + args.max_new_tokens > args.max_context:
        trajectory.status = "over_context"
    else:
        extend_segments(trajectory.segments, prompt)
        return prompt
    return None


def read_turn(trajectory: Trajectory, chat: Chat, tools: dict) -> list[ToolCall]:
    """Read the last turn: an answer or a format error sets the status, calls are returned."""
    ids, number = trajectory.turns[-1].action_ids, len(trajectory.turns) - 1
    try:
        if ids[-1] != chat.end_id:
            raise FormatError("unfinished", "the turn was cut at its token limit")
        if number in trajectory.memory.get("notes_turns", []):
            return []  # notes are free text, see context.summarize
        calls, answer = parse_action(chat.opened + chat.decode(ids[:-1]), tools)
    except FormatError as error:
        trajectory.status, trajectory.error = "format_error", error.kind
        trajectory.memory["why"] = str(error)
        return []
    if answer is not None:
        trajectory.status, trajectory.answer = "answered", answer
    return calls


def take_results(trajectory: Trajectory, results: list[tuple[str, bool]]) -> None:
    """Write the results of the last turn's calls into the trajectory.

    Args:
        results: (text, whether the environment failed) of each call. MAX_FAULTY_TURNS turns
            with one in a row end the trajectory as tool_fault, which nobody is punished for.
    """
    turn = trajectory.turns[-1]
    turn.results = [text for text, _ in results]
    turn.faults = sum(is_fault for _, is_fault in results)
    for call, text in zip(turn.calls, turn.results):
        url = call["arguments"].get("url")
        opened = [url] if isinstance(url, str) else []
        if not text.startswith("error"):
            trajectory.pages += opened
        seen = dict.fromkeys(opened + urls_in(text))
        trajectory.urls += [address for address in seen if address not in trajectory.urls]
    with_calls = [t for t in trajectory.turns if t.results]  # a turn of notes calls nothing
    last = with_calls[-MAX_FAULTY_TURNS:]
    if len(last) == MAX_FAULTY_TURNS and all(t.faults for t in last):
        trajectory.status = "tool_fault"


class AgentLoop:
    """Plays trajectories: `add` some, then call `step` as long as the loop is `busy`.

    Results and new trajectories join at every `args.tool_steps`-th engine step, so that prompts are
    computed in large batches.

    Args:
        engine, chat, toolbox, args: the policy, its chat template, the tools, the limits.
        lockstep: for sync mode, where equal seeds give equal bits. A result joins at a step that
            does not depend on how long its tool took: the first join at least `tool_steps` steps
            after the call, or the next one once nothing is left to decode. The engine waits for it
            there. Otherwise, and always on a server, a result joins once it has come.
    """

    def __init__(self, engine: Engine, chat: Chat, toolbox: Toolbox, args, lockstep: bool = False):
        self.engine, self.chat, self.toolbox, self.args = engine, chat, toolbox, args
        self.lockstep = lockstep and not args.engine
        self.queue: deque[Trajectory] = deque()  # they wait for a free slot
        self.ready: list[Slot] = []  # at a turn boundary, with nothing to wait for
        self.tool_runs: list[ToolRun] = []
        self.ended: list[Trajectory] = []  # since `step` returned last
        self.steps = 0  # of the engine; where nothing decodes it jumps to the next join

    def add(self, trajectories: list[Trajectory]) -> None:
        """Queue fresh trajectories, or parked ones that go on at their turn boundary."""
        self.queue.extend(trajectories)

    def busy(self) -> bool:
        return bool(self.queue) or any(self.engine.slots)

    def held(self) -> list[Trajectory]:
        """The trajectories in flight, each as it was at its last turn boundary: calls that run now
        may have changed what tools keep in memory, and elsewhere they are made again.
        """
        before = {run.slot: run.memory for run in self.tool_runs}
        return [
            replace(slot.trajectory, memory=before.get(slot, slot.trajectory.memory))
            for slot in filter(None, self.engine.slots)
        ]

    def step(self, hold: bool = False) -> list[Trajectory]:
        """One engine step; returns the trajectories that ended in it.

        Args:
            hold: begin no turn. This is all there is to partial rollout and to new weights: once no
                slot is in the middle of a turn, every trajectory is at a turn boundary.
        """
        if self.steps % self.args.tool_steps == 0:
            if not hold:
                self.start_trajectories()
            self.join_results()
            if not hold:
                self.begin_turns()
        if self.engine.at_boundary():  # there is nothing to decode: go straight to the next join
            self.steps += -self.steps % self.args.tool_steps
            if not self.lockstep:  # else `join_results` waits
                self.wait(self.tool_runs, 0.005)
        else:
            for slot in self.engine.step():
                self.end_turn(slot)
            self.steps += 1
        ended, self.ended = self.ended, []
        return ended

    def start_trajectories(self) -> None:
        """Give free places to queued trajectories."""
        for place in self.engine.free_places()[: len(self.queue)]:
            trajectory = self.queue.popleft()
            if not trajectory.head_ids:
                trajectory.head_ids = self.chat.head(trajectory.task.question)
            slot = self.engine.slots[place] = Slot(trajectory)
            last = trajectory.turns[-1] if trajectory.turns else None
            if last and last.calls and not last.results:  # it was lost before its tools answered
                self.run_tools(slot, [ToolCall(**call) for call in last.calls])
            else:
                self.ready.append(slot)

    def begin_turns(self) -> None:
        """Let the context manager make the next prompts; a trajectory at a limit ends."""
        for slot in self.ready:
            prompt = next_prompt(slot.trajectory, self.chat, self.args)
            if prompt is None:
                self.end_trajectory(slot)
            else:
                self.engine.start_turn(slot, prompt)
        self.ready.clear()

    def end_turn(self, slot: Slot) -> None:
        """Record what was sampled, and do what it says."""
        trajectory = slot.trajectory
        turn = Turn(slot.ids, slot.logprobs, self.engine.version, began=slot.began)
        turn.generate_s = time.perf_counter() - slot.began
        add_turn(trajectory, turn)
        calls = self.read_turn(trajectory)
        turn.calls = [{"name": call.name, "arguments": call.arguments} for call in calls]
        if trajectory.status != "running":
            self.end_trajectory(slot)
        elif calls:
            self.run_tools(slot, calls)
        else:
            self.ready.append(slot)

    def read_turn(self, trajectory: Trajectory) -> list[ToolCall]:
        """A method, so that a scripted loop can read turns in its own way."""
        return read_turn(trajectory, self.chat, self.toolbox.tools_for(trajectory))

    def run_tools(self, slot: Slot, calls: list[ToolCall]) -> None:
        """Let the calls run in a thread beside the engine."""
        memory = copy.deepcopy(slot.trajectory.memory)
        results = in_thread(run_calls, calls, self.toolbox.tools_for(slot.trajectory))
        self.tool_runs.append(ToolRun(slot, self.steps, time.perf_counter(), memory, results))

    def join_results(self) -> None:
        """Make observations of the results that have come; give up calls that take too long."""
        decoding, still_running = not self.engine.at_boundary(), []
        for run in self.tool_runs:
            if self.lockstep:
                if decoding and self.steps - run.step < self.args.tool_steps:
                    still_running.append(run)
                    continue
                self.wait([run], run.since + self.args.tool_timeout_s - time.perf_counter())
            seconds = time.perf_counter() - run.since
            if run.results.done():
                self.observe(run.slot, run.results.result(), seconds)
            elif seconds >= self.args.tool_timeout_s:
                run.slot.trajectory.memory = run.memory  # late calls write to the old dict
                late = f"error: no answer within {self.args.tool_timeout_s:g} s"
                calls = run.slot.trajectory.turns[-1].calls
                self.observe(run.slot, [(late, True)] * len(calls), seconds)
            else:
                still_running.append(run)
        self.tool_runs = still_running

    def observe(self, slot: Slot, results: list[tuple[str, bool]], seconds: float) -> None:
        """Make the results the observation of the last turn."""
        trajectory, turn = slot.trajectory, slot.trajectory.turns[-1]
        take_results(trajectory, results)
        turn.observation_ids = self.chat.observation(turn.results, self.args.observation_tokens)
        turn.tool_s = seconds
        if trajectory.status == "running":
            self.ready.append(slot)
        else:
            self.end_trajectory(slot)

    def wait(self, runs: list[ToolRun], seconds: float) -> None:
        """Wait until one of these tool runs is done, at most so many seconds."""
        clock, results = time.perf_counter(), [run.results for run in runs]
        end = clock + seconds
        while not any(r.done() for r in results) and (left := end - time.perf_counter()) > 0:
            endings.check()
            if results:
                concurrent.futures.wait(results, min(left, 0.5), "FIRST_COMPLETED")
            else:
                time.sleep(left)
        self.engine.stats["idle_s"] += time.perf_counter() - clock

    def end_trajectory(self, slot: Slot) -> None:
        self.engine.slots[self.engine.slots.index(slot)] = None
        self.toolbox.close(slot.trajectory)
        self.ended.append(slot.trajectory)


# ------------------------------------------------------------------------------------ sync rollouts


def play(loop: AgentLoop, trajectories: list[Trajectory], progress=None) -> list[Trajectory]:
    """Play all trajectories to their end in this process, and return them in the order given.

    Args:
        loop: a loop that is not busy.
        trajectories: fresh ones, or parked ones that go on.
        progress: a bar that is moved on by each trajectory that ends, or None.

    Raises:
        Stopped: the user asked for an end.
    """
    loop.add(trajectories)
    while loop.busy():
        endings.check()
        ended = loop.step()
        if progress is not None:
            progress.update(len(ended))
    return trajectories


class SyncRollouts:
    """Groups of trajectories, played in the trainer's own process (--rollout sync).

    Args:
        loop: an `AgentLoop` in lockstep.
        next_group: next_group(n, version) gives the n-th group of this process's stream of tasks.
        enough: groups of one update.
        next_number: n of the first group.
    """

    restarts = 0  # of workers: there are none

    def __init__(self, loop: AgentLoop, next_group, enough: int, next_number: int):
        self.loop, self.next_group, self.enough = loop, next_group, enough
        self.next_number, self.idle_share = next_number, 0.0

    def collect(self, version: int, progress=None) -> list[Group]:
        """Whole groups for one update, sampled by the weights of this version alone."""
        clock, idle_s = time.perf_counter(), self.loop.engine.stats["idle_s"]
        numbers = range(self.next_number, self.next_number + self.enough)
        groups = [self.next_group(number, version) for number in numbers]
        play(self.loop, [t for group in groups for t in group.trajectories], progress)
        self.next_number += self.enough
        idle_s = self.loop.engine.stats["idle_s"] - idle_s
        self.idle_share = idle_s / (time.perf_counter() - clock)
        return groups

    def publish(self, model, version: int) -> None:
        """The sampler uses the learner's own weights, so there is nothing to copy."""
        self.loop.engine.new_weights(version)

    def parked(self) -> int:
        return 0

    def state(self, ask: bool = True) -> None:
        """Nothing is under way between two updates."""

    def close(self) -> None:
        self.loop.toolbox.close_all()
