"""Rollout processes: several engines beside the trainer, and the queue that feeds them.

    trainer                                             each worker
    -------                                             -----------
    queue of trajectories, groups under way             an AgentLoop with an engine and tools
        trajectories, oldest group first  -- pipe ->    free slots take them
        enough groups, or budget over: hold  ------>    no turn begins; the turns under way end
        groups under way                  <- pipe --    their state at the turn boundary
    reward, advantages, update
    new weights into shared memory, "go"  -- pipe ->    copied between turns, version and checksum
                                                        compared; held trajectories go on
        finished trajectories             <- pipe --    each as it ends

Three rules keep it from hanging, whatever dies when. Each worker has a pipe of its own, which
nobody reads or writes blocking. Weights lie in shared memory under a version and a checksum,
without a lock. The trainer alone keeps the books, so it hands out what a dead worker held again,
from its last known turn boundary. (A queue that processes share dies with a process that is killed
while it holds the lock.)

In: `next_group` makes the groups to play. Out: `collect` gives the whole groups that an update
trains on. A group that was begun is always trained, once and whole, however long it takes: without
the late ones the policy would learn from short, easy trajectories only. With --partial an update's
rollouts end when enough groups are whole, or when the budget is over. The other groups are held at
a turn boundary and go on first, with new weights. A group that is `max_age` updates old is waited
for. With --overlap the workers go on during the update, and stop at a turn boundary only to copy
new weights. To try an idea (which groups go first, how many run ahead), change
`AsyncRollouts.collect`.
"""

import multiprocessing.connection
import os
import pickle
import signal
import sys
import time
import zlib
from collections import deque
from dataclasses import asdict, dataclass, field
from multiprocessing import resource_tracker

import torch
import torch.multiprocessing
import transformers
from transformers.hf_argparser import HfArg

from context import Chat, Segment, Trajectory, Turn
from data.task import Task
from engine import WorkerError, check_finite, keep_memory, load_policy
from rollout import AgentLoop, Group, RolloutArgs
from server_engine import open_engine
from support import endings
from support.toolbox import Toolbox
from support.user_code import where_it_failed
from tools import signatures

SILENCE_S = 600.0  # a worker that has said nothing for so long is killed and replaced
FEW = 0.25  # --partial: below this share of slots in use, a group of the next update is begun
MAX_DEATHS = 5  # of workers in a row, without a finished trajectory between, before the run stops


@dataclass
class AsyncArgs:
    """Flags of --rollout async."""

    workers: int = HfArg(default=0, help="rollout processes of each rank (0: one a core, or a GPU)")
    partial: bool = HfArg(default=False, help="park unfinished work, go on with the next weights")
    ahead: float = HfArg(default=0.5, help="partial: groups begun early, as a share of an update's")
    budget_s: float = HfArg(default=0.0, help="partial: seconds of rollouts (0: no limit)")
    budget_tokens: int = HfArg(default=0, help="partial: sampled tokens of a rank (0: no limit)")
    max_age: int = HfArg(default=4, help="partial: updates after which a group is waited for")
    overlap: bool = HfArg(default=False, help="partial: go on with old weights during the update")


def group_from(plain: dict) -> Group:
    """The inverse of `dataclasses.asdict` for a Group."""
    trajectories = []
    for fields in plain["trajectories"]:
        fields = dict(fields, task=Task(**fields["task"]), key=tuple(fields["key"]))
        fields["turns"] = [Turn(**turn) for turn in fields["turns"]]
        fields["segments"] = [Segment(**segment) for segment in fields["segments"]]
        trajectories.append(Trajectory(**fields))
    return Group(plain["position"], plain["born"], trajectories)


# ---------------------------------------------------------------------------- what processes share


class Channel:
    """Whole messages over one end of a duplex pipe. Nothing blocks: what does not fit into the pipe
    waits in `outgoing`, and half a message waits in `incoming`. So neither a full pipe nor a peer
    that died in mid-sentence stops us.
    """

    def __init__(self, connection):
        self.connection, self.closed = connection, False
        self.incoming, self.outgoing = bytearray(), bytearray()
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
        except OSError:  # the peer has died; `receive` still gives what it had said
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
        while len(self.incoming) >= 8:
            end = 8 + int.from_bytes(self.incoming[:8], "big")
            if len(self.incoming) < end:
                break
            messages.append(pickle.loads(self.incoming[8:end]))
            del self.incoming[:end]
        return messages


class SharedWeights:
    """A model's parameters in memory that all processes see: one writer, many readers, no lock that
    a killed process could hold.

    The writer takes the version away, writes, then sets checksum and version. A reader copies, then
    compares both with its copy, so it never uses a mix of two versions. The memory has no name and
    goes with the last process that maps it.
    """

    def __init__(self, model):
        self.sizes = [parameter.numel() for parameter in model.parameters()]
        self.flat = torch.zeros(sum(self.sizes)).share_memory_()  # float32, as load_policy's
        self.header = torch.tensor([-1, 0]).share_memory_()  # version, checksum

    def version(self) -> int:
        """-1 while they are being written."""
        return int(self.header[0])

    @torch.no_grad()
    def write(self, model, version: int) -> None:
        """Raises WorkerError if a weight is not finite; the old weights then stay."""
        own = list(zip(model.parameters(), self.flat.split(self.sizes)))  # empty: a server has them
        check_finite((parameter for parameter, _ in own), version)
        self.header[0] = -1
        for parameter, part in own:
            part.copy_(parameter.flatten())
        self.header[1] = zlib.crc32(self.flat.numpy())
        self.header[0] = version

    @torch.no_grad()
    def read(self, model, patience_s: float = 60.0) -> int:
        """Copy the newest whole weights into a model of the same architecture; returns their
        version.

        Raises:
            RuntimeError: none were whole for `patience_s` seconds.
        """
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            version, checksum = self.header.tolist()
            if version >= 0:
                copy = self.flat.clone()
                if self.version() == version and zlib.crc32(copy.numpy()) == checksum:
                    for parameter, part in zip(model.parameters(), copy.split(self.sizes)):
                        parameter.copy_(part.view(parameter.shape))
                    return version
            time.sleep(0.002)
        raise RuntimeError("no whole weights in shared memory")


# ---------------------------------------------------------------------------------- in each worker


@dataclass
class Setup:
    """What a worker needs to begin: plain data, and a class that it can import."""

    model: str  # for load_policy
    args: RolloutArgs
    device: str = "cpu"
    threads: int = 1
    loop: type = AgentLoop


class Worker:
    """A worker's end of the pipe, and its agent loop."""

    def __init__(self, channel: Channel, weights: SharedWeights, setup: Setup):
        self.channel, self.weights = channel, weights
        local = not setup.args.engine  # a server has the weights, and we have their version
        self.model, tokenizer = load_policy(setup.model, setup.device, weights=local)
        chat = Chat(tokenizer, signatures())
        self.engine = open_engine(self.model, chat, setup.args)
        self.engine.new_weights(weights.read(self.model))
        self.loop = setup.loop(self.engine, chat, Toolbox(setup.args), setup.args)
        self.hold = False
        self.asked, self.answered = 0, 0  # number of the last hold, and of the last one we answered
        self.started = self.spoke = time.perf_counter()
        self.say("ready")

    def say(self, kind: str, content=None) -> None:
        """Send (kind, content, seconds of work so far, tokens sampled so far)."""
        self.spoke = time.perf_counter()
        working_s = self.spoke - self.started - self.engine.stats["idle_s"]
        self.channel.send((kind, content, working_s, self.engine.stats["sampled"]))

    def listen(self) -> None:
        """Read the pipe. At a turn boundary, take new weights and answer a hold."""
        for kind, content in self.channel.receive():
            if kind == "play":
                self.loop.add(content)
            elif kind == "hold":
                self.hold, self.asked = True, content
            elif kind == "go":
                self.hold = False
        if self.engine.at_boundary():
            if self.weights.version() not in (-1, self.engine.version):
                self.engine.new_weights(self.weights.read(self.model))
            if self.hold and self.answered != self.asked:
                self.answered = self.asked
                self.say("held", (self.asked, self.loop.held()))
        if time.perf_counter() - self.spoke > 0.5:
            self.say("alive")
        self.channel.flush()

    def run(self) -> None:
        """Play until the trainer closes the pipe."""
        while not self.channel.closed:
            self.listen()
            hold = self.hold or self.weights.version() != self.engine.version
            for trajectory in self.loop.step(hold):
                self.say("done", trajectory)
        self.loop.toolbox.close_all()


def work(connection, weights: SharedWeights, setup: Setup, parent: int) -> None:
    """A worker's life. The parent owns shutdown, so signals from the terminal are not for us."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # see endings.deaf
    endings.die_with_parent(parent)
    torch.set_num_threads(setup.threads)
    keep_memory()
    transformers.utils.logging.disable_progress_bar()
    channel = Channel(connection)
    try:
        Worker(channel, weights, setup).run()
    except BaseException as error:
        channel.send(("error", where_it_failed(error), 0.0, 0))
        deadline = time.monotonic() + 5.0
        while channel.outgoing and time.monotonic() < deadline:
            time.sleep(0.01)
            channel.flush()
    os._exit(0)  # a tool that hangs in a thread must not keep us


# ---------------------------------------------------------------------------------- in the trainer


@dataclass(eq=False)
class Process:
    """What the trainer knows of a worker."""

    number: int
    process: object
    channel: Channel
    heard: float  # when it last said something, time.monotonic()
    ready: bool = False
    held: bool = False
    keys: set = field(default_factory=set)  # of the trajectories that it plays
    working_s: float = 0.0  # since it was ready, without the time in which its engine had no work
    sampled: int = 0  # tokens


class AsyncRollouts:
    """Keeps the queue, the groups under way and the workers of one trainer process.

    Args:
        model: the learner's; after each `publish` the workers sample from its weights.
        setup: of each worker.
        workers: how many.
        next_group: next_group(n, version) gives the n-th group of this process's stream of tasks,
            or None when there are no more.
        enough: whole groups that an update asks for.
        args: the flags; `workers` is not read.
        version: of the weights now.
        state: of an earlier run, see `state`. Workers start here, after it was loaded.
        engine: of the trainer itself, which evaluates; it gets each version, too.
    """

    def __init__(
        self,
        model,
        setup: Setup,
        workers: int,
        next_group,
        enough: int,
        args: AsyncArgs,
        version: int = 0,
        state: dict | None = None,
        engine=None,
    ):
        self.setup, self.next_group, self.enough, self.args = setup, next_group, enough, args
        self.engine = engine
        self.silence_s = SILENCE_S
        ahead = max(1, round(args.ahead * enough)) if args.partial else 0
        self.most_groups = enough + ahead  # under way at once
        self.few = FEW * setup.args.slots * workers if args.partial else 0
        self.groups: dict[int, Group] = {}  # under way, by position
        self.lent: list[Group] = []  # whole, collected, and not yet trained on
        self.where: dict[tuple, tuple[int, int]] = {}  # key -> (position, index) of those that run
        self.queue: deque[tuple] = deque()  # keys of those that no worker plays, oldest group first
        self.next_number = state["next_number"] if state else 0
        for plain in state["groups"] if state else []:
            self.begin(group_from(plain))
        self.holds, self.holding = 0, False
        self.deaths, self.restarts, self.idle_share = 0, 0, 0.0
        self.working_s, self.sampled = 0.0, 0  # of all workers, those that were replaced as well
        self.seen = (time.monotonic(), 0.0)  # end of the last collect, and the work done by then
        self.progress = None
        self.weights = SharedWeights(torch.nn.Module() if setup.args.engine else model)
        self.weights.write(model, version)
        self.context = torch.multiprocessing.get_context("spawn")
        self.workers: list[Process] = []
        resource_tracker.ensure_running()  # it would let signals through in the middle of `start`
        try:
            for number in range(workers):
                self.start(number)
        except BaseException:
            self.close()
            raise

    def start(self, number: int) -> None:
        """Start worker `number`, or its replacement, from the main thread: the worker ends with the
        thread that started it.
        """
        ours, theirs = self.context.Pipe()
        arguments = (theirs, self.weights, self.setup, os.getpid())
        process = self.context.Process(
            target=work, args=arguments, daemon=True, name=f"rollout-{number}"
        )
        with endings.deaf():
            process.start()
        theirs.close()
        worker = Process(number, process, Channel(ours), time.monotonic(), held=self.holding)
        self.workers[number : number + 1] = [worker]

    # What an update asks for.

    def collect(self, version: int, progress=None) -> list[Group]:
        """Play until enough groups are whole, and take them out of the books.

        Args:
            version: of the weights now.
            progress: a bar that is moved on by each trajectory that ends, or None.

        Raises:
            Stopped: the user asked for an end.
            WorkerError: the workers cannot go on.
        """
        self.progress = progress
        self.pump(0.0)
        if not self.args.overlap:
            self.seen = (time.monotonic(), self.working_s)
        started, tokens = time.monotonic(), self.sampled
        self.top_up(version, self.enough)
        while self.groups and not self.enough_whole(version, started, tokens):
            endings.check()
            if len(self.where) < self.few:
                self.top_up(version, min(len(self.groups) + 1, self.most_groups))
            self.pump(0.1)
        if not self.args.overlap:
            self.hold()
        whole = [group for group in self.groups.values() if group.whole()]
        self.lent = sorted(whole, key=lambda group: group.position)
        for group in self.lent:
            del self.groups[group.position]
        now = time.monotonic()
        possible_s = max(1e-9, (now - self.seen[0]) * len(self.workers))
        self.idle_share = max(0.0, 1.0 - (self.working_s - self.seen[1]) / possible_s)
        self.seen = (now, self.working_s)
        if self.args.overlap:
            self.top_up(version, self.enough)  # so that nobody idles during the update
        return self.lent

    def enough_whole(self, version: int, started: float, tokens: int) -> bool:
        """Whether the rollouts of an update may end.

        Args:
            started: when they began, by `time.monotonic`.
            tokens: `self.sampled` at that time.
        """
        whole = sum(group.whole() for group in self.groups.values())
        late = any(
            version - group.born >= self.args.max_age and not group.whole()
            for group in self.groups.values()
        )
        seconds, sampled = time.monotonic() - started, self.sampled - tokens
        over = 0 < self.args.budget_s < seconds or 0 < self.args.budget_tokens < sampled
        return not late and (whole >= min(self.enough, len(self.groups)) or (over and whole > 0))

    def publish(self, model, version: int) -> None:
        """The groups of the last `collect` are trained: hand the new weights to the workers and let
        them go on.

        Raises:
            WorkerError: the weights are not finite.
        """
        self.lent = []
        if self.setup.args.engine and self.args.overlap:
            self.hold()  # no turn may be in flight on a server whose weights change
        if self.engine is not None:
            self.engine.new_weights(version)
        self.weights.write(model, version)
        self.go()

    def parked(self) -> int:
        """Trajectories that were begun and are carried over."""
        under_way = [t for group in self.groups.values() for t in group.trajectories]
        return sum(t.status == "running" and bool(t.turns) for t in under_way)

    def state(self, ask: bool = True) -> dict:
        """Everything under way as plain data, for a checkpoint: each trajectory at the last turn
        boundary that we know of.

        Args:
            ask: with overlap, first ask the workers how far they are.
        """
        if self.args.overlap and ask:
            self.hold()
            self.go()
        groups = {group.position: group for group in [*self.lent, *self.groups.values()]}
        plain = [asdict(group) for group in groups.values()]
        return {"next_number": self.next_number, "groups": plain}

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
        self.groups[group.position] = group
        for index, trajectory in enumerate(group.trajectories):
            if trajectory.status == "running":
                self.where[trajectory.key] = (group.position, index)
                self.queue.append(trajectory.key)

    def top_up(self, version: int, most: int) -> None:
        """Begin groups until `most` are under way."""
        while len(self.groups) < most and (group := self.next_group(self.next_number, version)):
            self.next_number += 1
            self.begin(group)
        self.hand_out()

    def hand_out(self) -> None:
        """Give waiting trajectories to the workers with the fewest: as many as have a slot, and a
        few more, so that a slot is refilled at once.
        """
        if self.holding:
            return
        parcels: dict[Process, list[Trajectory]] = {}
        most = self.setup.args.slots + 2
        while self.queue:
            able = [worker for worker in self.workers if worker.ready and len(worker.keys) < most]
            if not able:
                break
            worker, key = min(able, key=lambda worker: len(worker.keys)), self.queue.popleft()
            position, index = self.where[key]
            worker.keys.add(key)
            parcels.setdefault(worker, []).append(self.groups[position].trajectories[index])
        for worker, trajectories in parcels.items():
            worker.channel.send(("play", trajectories))

    def keep(self, worker: Process, trajectory: Trajectory) -> bool:
        """Write down what a worker says of a trajectory, if by our books the worker holds it."""
        if trajectory.key not in worker.keys:
            return False
        position, index = self.where[trajectory.key]
        self.groups[position].trajectories[index] = trajectory
        if trajectory.status != "running":
            worker.keys.discard(trajectory.key)
            del self.where[trajectory.key]
        return True

    # Talking to workers.

    def hold(self) -> None:
        """Wait until every trajectory stands at a turn boundary and we know it."""
        self.holds, self.holding = self.holds + 1, True
        for worker in self.workers:
            worker.held = not worker.ready
            worker.channel.send(("hold", self.holds))
        while not all(worker.held for worker in self.workers):
            endings.check()
            self.pump(0.1)

    def go(self) -> None:
        self.holding = False
        for worker in self.workers:
            worker.channel.send(("go", None))
        self.hand_out()

    def pump(self, timeout_s: float) -> None:
        """Wait for news, at most so many seconds; read what has come; replace workers that have
        died or gone silent.
        """
        if any(worker.channel.outgoing for worker in self.workers):
            timeout_s = min(timeout_s, 0.005)
        ends = [end for w in self.workers for end in (w.channel, w.process.sentinel)]
        multiprocessing.connection.wait(ends, timeout_s)
        for worker in list(self.workers):
            dead = not worker.process.is_alive()  # asked first, so what it had said has all come
            worker.channel.flush()
            for message in worker.channel.receive():
                self.hear(worker, *message)
            silent_s = time.monotonic() - worker.heard
            if dead or worker.channel.closed:
                worker.process.join(1.0)
                code = worker.process.exitcode
                killed = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else ""
                self.replace(worker, killed or f"ended (code {code})")
            elif silent_s > self.silence_s:
                self.replace(worker, f"said nothing for {silent_s:.0f} s")
        self.hand_out()

    def hear(self, worker: Process, kind: str, content, working_s: float, sampled: int) -> None:
        self.working_s += working_s - worker.working_s
        self.sampled += sampled - worker.sampled
        worker.heard, worker.working_s, worker.sampled = time.monotonic(), working_s, sampled
        if kind == "ready":
            worker.ready = True
        elif kind == "done":
            if self.keep(worker, content):
                self.deaths = 0
                if self.progress is not None:
                    self.progress.update()
        elif kind == "held":
            hold, trajectories = content
            worker.held = worker.held or hold == self.holds
            for trajectory in trajectories:
                self.keep(worker, trajectory)
        elif kind == "error":
            raise WorkerError(f"rollout worker {worker.number} failed: {content}")

    def replace(self, gone: Process, why: str) -> None:
        """A worker is gone: others begin its trajectories again from where we last saw them, with
        new random draws.
        """
        gone.process.kill()
        gone.channel.connection.close()
        for key in sorted(gone.keys, key=lambda key: self.where[key], reverse=True):
            position, index = self.where.pop(key)
            trajectory = self.groups[position].trajectories[index]
            trajectory.key = (*key[:-1], key[-1] + 1)
            self.where[trajectory.key] = (position, index)
            self.queue.appendleft(trajectory.key)
        self.deaths, self.restarts = self.deaths + 1, self.restarts + 1
        line = f"rollout worker {gone.number} (process {gone.process.pid}) {why}"
        if self.deaths >= MAX_DEATHS:
            raise WorkerError(
                f"{line}; {self.deaths} workers in a row were lost before a trajectory was finished"
            )
        line += f": replaced, {len(gone.keys)} trajectories handed out again"
        print(line, file=sys.stderr, flush=True)
        self.start(gone.number)
