"""Rollout processes: several engines beside the trainer, and the queue that feeds them (--rollout async).

Each worker plays trajectories with the loop of rollout.py, whose docstring shows who sends what to whom. Three rules keep it
from hanging, whatever dies when: a pipe a worker, read and written without blocking; weights in shared memory under a version
and a checksum instead of a lock; and the trainer alone keeps the books, so what a dead worker held is handed out again from
its last known turn boundary. (A queue shared by processes dies with a process that is killed while it holds the lock.)

In: `next_group` makes the groups of trajectories to play. Out: `collect` gives the whole groups that a step trains on. A group
that was begun is always trained, once, whole, however long it takes: dropping the late ones would teach the policy from short,
easy trajectories only. With --partial a step ends when `tasks_per_step` groups are whole (or its budget is over); the others
are held at a turn boundary and go on first, with new weights; a group `max_age` steps old is waited for.
To try an idea (which groups go first, how many run ahead), change `Rollouts.collect`.
"""

import contextlib
import ctypes
import multiprocessing.connection
import os
import pickle
import signal
import sys
import time
import traceback
import zlib
from collections import deque
from dataclasses import asdict, dataclass, field
from multiprocessing import resource_tracker

import torch
import torch.multiprocessing
import transformers

from context import Chat, Segment, Trajectory, Turn
from data.task import Task
from engine import keep_memory, load_policy
from rollout import RolloutArgs, engine_for, finish_turn, open_toolbox, play
from tools import signatures

SILENCE_S = 600.0  # a worker that has said nothing for so long is killed and replaced; it speaks between engine steps and after loading
FEW = 0.25  # with --partial: when fewer than this share of the slots is in use, a group of the next step is begun
MAX_DEATHS = 5  # in a row, without a finished trajectory in between, before the run stops


class WorkerError(RuntimeError):
    """The rollout processes cannot go on; the message is one line."""


@dataclass
class Group:
    """The attempts at one task whose rewards are compared with each other."""

    number: int  # place in the stream of tasks
    born: int  # version of the weights when it was begun
    trajectories: list[Trajectory]

    def whole(self) -> bool:
        return all(t.status != "running" for t in self.trajectories)


def make_group(task: Task, number: int, version: int, samples: int, seed: int) -> Group:
    """A fresh group. Its random draws come from (run seed, version, task, index in the group, number, attempt), whoever plays it; a
    trajectory that was lost with its worker goes on as the next attempt."""
    return Group(
        number,
        version,
        [
            Trajectory(task, (seed, version, zlib.crc32(task.id.encode()), index, number, 0))
            for index in range(samples)
        ],
    )


def group_from(plain: dict) -> Group:
    """The inverse of `dataclasses.asdict` for a Group."""

    def trajectory(fields: dict) -> Trajectory:
        return Trajectory(
            **fields
            | {
                "task": Task(**fields["task"]),
                "key": tuple(fields["key"]),
                "turns": [Turn(**turn) for turn in fields["turns"]],
                "segments": [Segment(**segment) for segment in fields["segments"]],
            }
        )

    return Group(
        plain["number"], plain["born"], [trajectory(fields) for fields in plain["trajectories"]]
    )


# ------------------------------------------------------------------------------------------------- what processes share


class Channel:
    """Whole messages over one end of a duplex pipe. Nothing blocks: what does not fit into the pipe waits in `outgoing`, and a
    message of which half has come waits in `incoming`, so neither a full pipe nor a peer that died in mid-sentence stops us."""

    def __init__(self, connection):
        self.connection, self.incoming, self.outgoing, self.closed = (
            connection,
            bytearray(),
            bytearray(),
            False,
        )
        os.set_blocking(connection.fileno(), False)

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message) -> None:
        data = pickle.dumps(message, protocol=5)
        self.outgoing += len(data).to_bytes(8, "big") + data
        self.flush()

    def flush(self) -> None:
        try:
            while self.outgoing:
                del self.outgoing[: os.write(self.fileno(), self.outgoing[: 1 << 16])]
        except BlockingIOError:
            pass
        except (
            OSError
        ):  # the peer has died: `receive` still gives what it said before, then sets `closed`
            self.outgoing.clear()

    def receive(self) -> list:
        """The messages that have come in whole; `closed` says that no more will come."""
        try:
            while not self.closed:
                data = os.read(self.fileno(), 1 << 20)
                self.incoming += data
                self.closed = not data
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        messages = []
        while len(self.incoming) >= 8 and len(self.incoming) >= (
            end := 8 + int.from_bytes(self.incoming[:8], "big")
        ):
            messages.append(pickle.loads(self.incoming[8:end]))
            del self.incoming[:end]
        return messages


class SharedWeights:
    """A model's parameters in memory that all processes see: one writer, many readers, no lock that a killed process could hold.

    The writer takes the version away, writes, then sets checksum and version. A reader copies, then compares both with its copy:
    it never uses a mix of two versions. The memory has no name and goes with the last process that maps it.
    """

    def __init__(self, model):
        self.places, at = [], 16  # header: version, checksum
        for parameter in model.parameters():
            size = parameter.numel() * parameter.element_size()
            self.places.append((at, at + size))
            at += -(-size // 8) * 8
        self.buffer = torch.zeros(at, dtype=torch.uint8).share_memory_()
        self.header()[0] = -1

    def header(self):
        return self.buffer[:16].numpy().view("int64")

    def version(self) -> int:
        """-1 while they are being written."""
        return int(self.header()[0])

    @torch.no_grad()
    def write(self, model, version: int) -> None:
        """Raises WorkerError if a weight is not finite; the old weights then stay."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
            raise WorkerError(
                f"the weights of version {version} are not all finite: they are not handed to the rollout workers"
            )
        header = self.header()
        header[0] = -1
        for parameter, (start, end) in zip(model.parameters(), self.places):
            self.buffer[start:end].copy_(
                parameter.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
            )
        header[1] = zlib.crc32(self.buffer[16:].numpy())
        header[0] = version

    @torch.no_grad()
    def read(self, model, patience_s: float = 60.0) -> int:
        """Copy the newest whole weights into a model of the same architecture; returns their version.

        Raises:
            RuntimeError: none were whole for `patience_s` seconds.
        """
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            version, checksum = self.header().tolist()
            if version >= 0:
                copy = self.buffer.clone()
                if self.version() == version and zlib.crc32(copy[16:].numpy()) == checksum:
                    for parameter, (start, end) in zip(model.parameters(), self.places):
                        parameter.copy_(copy[start:end].view(parameter.dtype).view(parameter.shape))
                    return version
            time.sleep(0.002)
        raise RuntimeError("no whole weights in shared memory")


# ------------------------------------------------------------------------------------------------------ in each worker


@dataclass
class Setup:
    """What a worker needs to begin: plain data, and functions that it can import."""

    policy: str  # for load_policy
    args: RolloutArgs
    device: str = "cpu"
    threads: int = 1
    toolbox: object = open_toolbox  # RolloutArgs -> Toolbox
    act: object = finish_turn  # reads a turn, see rollout.finish_turn


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Linux sends this process a signal when the thread that started it ends; elsewhere the closed pipe must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before we could ask for that
        os._exit(1)


def where_it_failed(error: BaseException) -> str:
    """An exception in one line, with file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{place}"


class Worker:
    """The worker's end of the pipe, as the functions that `play` asks for."""

    def __init__(self, channel: Channel, weights: SharedWeights, setup: Setup):
        self.channel, self.weights = channel, weights
        self.model, tokenizer = load_policy(setup.policy, setup.device)
        self.chat = Chat(tokenizer, signatures())
        args = setup.args
        self.engine = engine_for(self.model, self.chat, args)
        self.engine.new_weights(weights.read(self.model))
        self.queue: deque[Trajectory] = deque()
        self.hold, self.asked, self.answered = (
            False,
            0,
            0,
        )  # `asked` counts holds, `answered` is the last one we answered
        self.started = self.spoke = time.perf_counter()
        self.say("ready")

    def say(self, kind: str, content=None) -> None:
        now = time.perf_counter()
        self.spoke = now
        self.channel.send(
            (
                kind,
                content,
                now - self.started - self.engine.stats["idle_s"],
                self.engine.stats["sampled"],
            )
        )

    def take(self, n: int) -> list[Trajectory]:
        return [self.queue.popleft() for _ in range(min(n, len(self.queue)))]

    def finish(self, trajectory: Trajectory) -> None:
        self.say("done", trajectory)

    def holding(self) -> bool:
        """Read the pipe; take new weights and answer a hold as soon as no turn is under way. True: start no turn."""
        for kind, content in self.channel.receive():
            if kind == "play":
                self.queue.extend(content)
            elif kind == "hold":
                self.hold, self.asked = True, content
            elif kind == "go":
                self.hold = False
        if self.channel.closed:
            raise EOFError  # the trainer is done with us
        at_boundary = all(slot is None or slot.turn_done for slot in self.engine.slots)
        if at_boundary and self.weights.version() not in (-1, self.engine.version):
            self.engine.new_weights(self.weights.read(self.model))
        if at_boundary and self.hold and self.answered != self.asked:
            self.answered = self.asked
            self.say("held", (self.asked, [slot.trajectory for slot in self.engine.slots if slot]))
        if time.perf_counter() - self.spoke > 0.5:
            self.say("alive")
        self.channel.flush()
        return self.hold or self.weights.version() != self.engine.version


def work(connection, weights: SharedWeights, setup: Setup, parent: int) -> None:
    """A worker's life. The parent owns shutdown: signals from the terminal are not for us."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # see signals_later
    die_with_parent(parent)
    torch.set_num_threads(setup.threads)
    keep_memory()
    transformers.utils.logging.disable_progress_bar()
    channel = Channel(connection)
    try:
        worker = Worker(channel, weights, setup)
        play(
            worker.engine,
            worker.chat,
            setup.toolbox(setup.args),
            setup.args,
            worker.take,
            worker.finish,
            worker.holding,
            act=setup.act,
        )
    except EOFError:
        pass
    except BaseException as error:
        channel.send(("error", where_it_failed(error), 0.0, 0))
        deadline = time.monotonic() + 5.0
        while channel.outgoing and time.monotonic() < deadline:
            time.sleep(0.01)
            channel.flush()
    os._exit(0)  # a tool that hangs in a thread must not keep us


# ------------------------------------------------------------------------------------------------------ in the trainer


@contextlib.contextmanager
def signals_later():
    """Signals wait until the block (or the decorated function) ends. A process started meanwhile is born deaf to the terminal's, before it could say so itself.

    Blocking them is for that child: in this process another thread would still receive them, and Python would run the handler
    here, in the middle of starting a worker. So the handlers are exchanged as well.
    """
    numbers, arrived = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM), []
    handlers = [
        signal.signal(number, lambda number, frame: arrived.append(number)) for number in numbers
    ]
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
        for number in arrived:  # the first one that is not ignored usually ends it
            signal.raise_signal(number)


@dataclass(eq=False)
class Process:
    """What the trainer knows of a worker."""

    number: int
    process: object
    channel: Channel
    heard: float  # when it last said something, time.monotonic()
    ready: bool = False
    held: bool = False
    keys: set = field(default_factory=set)  # of the trajectories it plays
    working_s: float = 0.0  # since it was ready, without the time its engine had nothing to do
    sampled: int = 0


class Rollouts:
    """Keeps the queue, the groups under way (the replay buffer) and the workers of one trainer process.

    Args:
        model: the learner's; its weights are what workers sample from, after each `publish`.
        setup: of each worker.
        workers: how many.
        next_group: next_group(n, version) gives the n-th group of this process's stream, or None when there are no more.
        enough: whole groups that end a step.
        partial, overlap, ahead, budget_s, budget_tokens, max_age: the flags of train.py; 0 means no budget.
        version: of the weights now.
        state: of an earlier run, see `state`. Workers start here, so after it was loaded.
    """

    def __init__(
        self,
        model,
        setup: Setup,
        workers: int,
        next_group,
        enough: int,
        partial: bool = False,
        overlap: bool = False,
        ahead: float = 0.5,
        budget_s: float = 0.0,
        budget_tokens: int = 0,
        max_age: int = 4,
        version: int = 0,
        state: dict | None = None,
    ):
        self.setup, self.next_group, self.enough, self.partial, self.overlap = (
            setup,
            next_group,
            enough,
            partial,
            overlap,
        )
        self.budget_s, self.budget_tokens, self.max_age = (
            budget_s or float("inf"),
            budget_tokens or float("inf"),
            max_age,
        )
        self.silence_s = SILENCE_S
        self.most_groups = enough + (
            max(1, round(ahead * enough)) if partial else 0
        )  # under way at once
        self.few = FEW * setup.args.slots * workers if partial else 0
        self.groups: dict[int, Group] = {}  # under way: the replay buffer
        self.lent: list[Group] = []  # whole, collected, and not yet trained on
        self.where: dict[
            tuple, tuple[int, int]
        ] = {}  # trajectory key -> (group, index) of those that run
        self.queue: deque[tuple] = deque()  # keys of those that no worker plays, oldest group first
        self.next_number = state["next_number"] if state else 0
        for plain in state["groups"] if state else []:
            self.begin(group_from(plain))
        self.holds, self.holding = 0, False
        self.deaths, self.restarts, self.idle_share = 0, 0, 0.0
        self.retired_s, self.retired_tokens = 0.0, 0  # work of replaced workers
        self.seen = (time.monotonic(), 0.0)  # end of the last step and the work done by then
        self.on_finish = None
        self.weights = SharedWeights(model)
        self.weights.write(model, version)
        self.context = torch.multiprocessing.get_context("spawn")
        self.workers: list[Process] = []
        resource_tracker.ensure_running()  # it would let signals through again in the middle of `start`
        try:
            for number in range(workers):
                self.start(number)
        except BaseException:
            self.close()
            raise

    def start(self, number: int) -> None:
        """Start worker `number`, or its replacement; from the main thread, since it dies with the thread that started it."""
        with signals_later():
            ours, theirs = self.context.Pipe()
            process = self.context.Process(
                target=work,
                args=(theirs, self.weights, self.setup, os.getpid()),
                daemon=True,
                name=f"rollout-{number}",
            )
            process.start()
            theirs.close()
            self.workers[number : number + 1] = [
                Process(number, process, Channel(ours), time.monotonic(), held=self.holding)
            ]

    # What a step asks for.

    def collect(self, version: int, on_finish=None) -> list[Group]:
        """Play until enough groups are whole, and take them out of the books.

        Args:
            version: of the weights now.
            on_finish: called with each finished trajectory, for a progress bar.
        """
        self.on_finish = on_finish
        self.pump(0.0)
        if not self.overlap:
            self.seen = (time.monotonic(), self.working_s())
        started, tokens = time.monotonic(), self.sampled()
        self.top_up(version, self.enough)
        while self.groups:
            if len(self.where) < self.few:
                self.top_up(version, min(len(self.groups) + 1, self.most_groups))
            whole = [group for group in self.groups.values() if group.whole()]
            over = (
                time.monotonic() - started > self.budget_s
                or self.sampled() - tokens > self.budget_tokens
            )
            due = any(
                version - group.born >= self.max_age and not group.whole()
                for group in self.groups.values()
            )
            if not due and (len(whole) >= min(self.enough, len(self.groups)) or over and whole):
                break
            self.pump(0.1)
        if not self.overlap:
            self.hold()
        whole = sorted(
            (group for group in self.groups.values() if group.whole()),
            key=lambda group: group.number,
        )
        self.lent = whole
        for group in whole:
            del self.groups[group.number]
        now, working_s = time.monotonic(), self.working_s()
        self.idle_share = max(
            0.0,
            1.0 - (working_s - self.seen[1]) / max(1e-9, (now - self.seen[0]) * len(self.workers)),
        )
        self.seen = (now, working_s)
        if self.overlap:
            self.top_up(version, self.enough)  # so that nobody idles during the update
        return whole

    def publish(self, model, version: int) -> None:
        """The groups of the last `collect` are trained: hand the new weights to the workers and let them go on.

        Raises:
            WorkerError: the weights are not finite.
        """
        self.weights.write(model, version)
        self.lent = []
        self.go()

    def parked(self) -> int:
        """Trajectories that were begun and are carried over."""
        return sum(
            t.status == "running" and bool(t.turns)
            for group in self.groups.values()
            for t in group.trajectories
        )

    def state(self, ask: bool = True) -> dict:
        """Everything under way as plain data, for a checkpoint: each trajectory at the last turn boundary that we know of.

        Args:
            ask: with overlap, first ask the workers how far they are.
        """
        if self.overlap and ask:
            self.hold()
            self.go()
        groups = {group.number: group for group in [*self.lent, *self.groups.values()]}
        return {
            "next_number": self.next_number,
            "groups": [asdict(group) for group in groups.values()],
        }

    def close(self) -> None:
        """End all workers, in a few seconds at most."""
        for worker in self.workers:
            worker.channel.connection.close()  # tells it to end
        deadline = time.monotonic() + 3.0
        for worker in self.workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join(2.0)
        self.workers = []

    # The books.

    def begin(self, group: Group) -> None:
        self.groups[group.number] = group
        for index, trajectory in enumerate(group.trajectories):
            if trajectory.status == "running":
                self.where[trajectory.key] = (group.number, index)
                self.queue.append(trajectory.key)

    def top_up(self, version: int, most: int) -> None:
        """Begin groups until `most` are under way."""
        while len(self.groups) < most and (group := self.next_group(self.next_number, version)):
            self.next_number += 1
            self.begin(group)
        self.hand_out()

    def hand_out(self) -> None:
        """Give waiting trajectories to the workers with the fewest: as many as have a slot, and a few more, so that a slot is
        refilled at once."""
        if self.holding:
            return
        parcels: dict[Process, list[Trajectory]] = {}
        most = self.setup.args.slots + 2
        while self.queue and (
            able := [worker for worker in self.workers if worker.ready and len(worker.keys) < most]
        ):
            worker, key = min(able, key=lambda worker: len(worker.keys)), self.queue.popleft()
            number, index = self.where[key]
            worker.keys.add(key)
            parcels.setdefault(worker, []).append(self.groups[number].trajectories[index])
        for worker, trajectories in parcels.items():
            worker.channel.send(("play", trajectories))

    def keep(self, worker: Process, trajectory: Trajectory) -> bool:
        """Write down what a worker says of a trajectory; what it does not hold by our books is not believed."""
        if trajectory.key not in worker.keys:
            return False
        number, index = self.where[trajectory.key]
        self.groups[number].trajectories[index] = trajectory
        if trajectory.status != "running":
            worker.keys.discard(trajectory.key)
            del self.where[trajectory.key]
        return True

    def working_s(self) -> float:
        return self.retired_s + sum(worker.working_s for worker in self.workers)

    def sampled(self) -> int:
        return self.retired_tokens + sum(worker.sampled for worker in self.workers)

    # Talking to workers.

    def hold(self) -> None:
        """Wait until every trajectory stands at a turn boundary and we know it."""
        self.holds, self.holding = self.holds + 1, True
        for worker in self.workers:
            worker.held = not worker.ready
            worker.channel.send(("hold", self.holds))
        while not all(worker.held for worker in self.workers):
            self.pump(0.1)

    def go(self) -> None:
        self.holding = False
        for worker in self.workers:
            worker.channel.send(("go", None))
        self.hand_out()

    def pump(self, timeout_s: float) -> None:
        """Wait for news at most `timeout_s` seconds, read what has come, replace workers that have died or gone silent."""
        if any(worker.channel.outgoing for worker in self.workers):
            timeout_s = min(timeout_s, 0.005)
        multiprocessing.connection.wait(
            [end for worker in self.workers for end in (worker.channel, worker.process.sentinel)],
            timeout_s,
        )
        for worker in list(self.workers):
            dead = (
                not worker.process.is_alive()
            )  # asked first: what it said before it died has then all come
            worker.channel.flush()
            for message in worker.channel.receive():
                self.hear(worker, *message)
            silent_s = time.monotonic() - worker.heard
            if dead or worker.channel.closed:
                worker.process.join(1.0)
                code = worker.process.exitcode
                self.replace(
                    worker,
                    f"was killed by {signal.Signals(-code).name}"
                    if code and code < 0
                    else f"ended (code {code})",
                )
            elif silent_s > self.silence_s:
                self.replace(worker, f"said nothing for {silent_s:.0f} s")
        self.hand_out()

    def hear(self, worker: Process, kind: str, content, working_s: float, sampled: int) -> None:
        worker.heard, worker.working_s, worker.sampled = time.monotonic(), working_s, sampled
        if kind == "ready":
            worker.ready = True
        elif kind == "done":
            if self.keep(worker, content):
                self.deaths = 0
                if self.on_finish:
                    self.on_finish(content)
        elif kind == "held":
            hold, trajectories = content
            worker.held = worker.held or hold == self.holds
            for trajectory in trajectories:
                self.keep(worker, trajectory)
        elif kind == "error":
            raise WorkerError(f"rollout worker {worker.number} failed: {content}")

    def replace(self, gone: Process, why: str) -> None:
        """A worker is gone: its trajectories are begun again from where we last saw them, by others, with new random draws."""
        gone.process.kill()
        gone.channel.connection.close()
        self.retired_s, self.retired_tokens = (
            self.retired_s + gone.working_s,
            self.retired_tokens + gone.sampled,
        )
        for key in sorted(gone.keys, key=lambda key: self.where[key], reverse=True):
            number, index = self.where.pop(key)
            trajectory = self.groups[number].trajectories[index]
            trajectory.key = (*key[:-1], key[-1] + 1)
            self.where[trajectory.key] = (number, index)
            self.queue.appendleft(trajectory.key)
        self.deaths, self.restarts = self.deaths + 1, self.restarts + 1
        line = f"rollout worker {gone.number} (process {gone.process.pid}) {why}"
        if self.deaths >= MAX_DEATHS:
            raise WorkerError(
                f"{line}; {self.deaths} workers in a row were lost before a trajectory was finished"
            )
        print(
            f"{line}: replaced, {len(gone.keys)} trajectories handed out again",
            file=sys.stderr,
            flush=True,
        )
        self.start(gone.number)
