"""Rollout processes: what they share, the schedule of partial rollouts, and what dies or hangs."""

import multiprocessing
import os
import pickle
import random
import re
import signal
import threading
import time
from dataclasses import asdict

import numpy as np
import psutil
import pytest
import torch
from scripted import ScriptedLoop, ScriptedToolbox, scripted_tasks, turns_of

from context import Turn
from engine import Engine
from rollout import AgentLoop, RolloutArgs, new_group, play
from support import run_folder
from tools import Python, ToolCall
from workers import (
    AsyncArgs,
    AsyncRollouts,
    Channel,
    Setup,
    SharedWeights,
    WorkerError,
    group_from,
)

ARGS = dict(slots=16, max_new_tokens=2, max_context=2000, max_turns=99, tool_steps=1)


@pytest.fixture
def tiny_path(tiny, tokenizer, tmp_path):
    tiny.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def make_pool(tiny, tiny_path, quick_start):
    """Rollouts over scripted tasks; closed when the test ends."""
    pools = []

    def make(
        tasks,
        samples=2,
        workers=1,
        enough=4,
        loop=ScriptedLoop,
        args=None,
        version=0,
        state=None,
        **flags,
    ):
        def next_group(number, version):
            if number < len(tasks):
                return new_group(tasks[number], number, samples, 0, version)

        setup = Setup(tiny_path, RolloutArgs(**ARGS | (args or {})), loop=loop)
        flags = AsyncArgs(**flags)
        pools.append(AsyncRollouts(tiny, setup, workers, next_group, enough, flags, version, state))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def make_loop(tiny, chat):
    """A scripted loop in this process."""

    def make(args: RolloutArgs, loop=ScriptedLoop, lockstep: bool = True) -> AgentLoop:
        return loop(Engine(tiny, chat, args), chat, None, args, lockstep)

    return make


def train_on_all(pool, model, version=0, each_step=None):
    """Steps until nothing is left; returns the groups of each step."""
    steps = []
    while groups := pool.collect(version):
        steps.append(groups)
        version += 1
        pool.publish(model, version)
        if each_step:
            each_step(version)
    return steps


def assert_each_exactly_once(steps, tasks, samples):
    groups = [group for step in steps for group in step]
    assert sorted(group.position for group in groups) == list(range(len(tasks)))
    for group in groups:
        assert group.whole() and len(group.trajectories) == samples
        assert [t.key[3] for t in group.trajectories] == list(range(samples))
        assert all(
            len(t.turns) == turns_of(t) and t.task == tasks[group.position]
            for t in group.trajectories
        )


def actions_of(trajectory) -> list[list[int]]:
    return [turn.action_ids for turn in trajectory.turns]


def ks(a, b):
    """Two-sample Kolmogorov-Smirnov statistic over its 1% critical value: above 1 the samples
    differ.
    """
    grid = np.union1d(a, b)
    cdf_a, cdf_b = (np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (a, b))
    return np.abs(cdf_a - cdf_b).max() / (1.63 * np.sqrt((len(a) + len(b)) / (len(a) * len(b))))


# ----------------------------------------------------------------------------- what processes share


def test_messages_larger_than_the_pipe_in_both_directions():
    a, b = map(Channel, multiprocessing.Pipe())
    sent = [os.urandom(3_000_000), {"ids": list(range(100_000))}]
    for message in sent:
        a.send(message)
        b.send(message)  # both pipes are full now, and nobody has blocked
    received = {a: [], b: []}
    deadline = time.monotonic() + 20
    while any(len(messages) < 2 for messages in received.values()) and time.monotonic() < deadline:
        for end in (a, b):
            end.flush()
            received[end] += end.receive()
    assert received == {a: sent, b: sent}


def test_a_peer_that_dies_in_mid_message_is_an_end_and_no_hang():
    a, b = map(Channel, multiprocessing.Pipe())
    a.send("whole")
    a.send(os.urandom(3_000_000))
    a.connection.close()
    assert b.receive() == ["whole"] and b.closed
    b.send("to nobody")
    assert not b.outgoing


def test_weights_are_never_torn_and_never_nan(tiny):
    weights = SharedWeights(tiny)
    model = pickle.loads(pickle.dumps(tiny))

    def fill(number):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)

    fill(0)
    weights.write(model, 0)
    done = threading.Event()

    def write():
        for version in range(1, 300):
            fill(version)
            weights.write(model, version)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    while not done.is_set():
        seen.append(weights.read(tiny))
        assert all(bool((parameter == seen[-1]).all()) for parameter in tiny.parameters())
    thread.join()
    assert seen == sorted(seen) and len(set(seen)) > 3
    fill(float("nan"))
    with pytest.raises(WorkerError, match="not all finite"):
        weights.write(model, 400)
    assert weights.read(tiny) == 299
    weights.flat[20] += 1  # a write that never ended leaves a checksum that does not fit
    with pytest.raises(RuntimeError, match="no whole weights"):
        weights.read(tiny, patience_s=0.05)


# ----------------------------------------------------------------------------------------- schedule


def test_no_completion_time_bias_groups_whole_age_bounded(make_pool, tiny):
    """With a fixed policy the lengths of trained trajectories are those of the synchronous run, and
    that over many partial updates.
    """
    samples = 2
    tasks = scripted_tasks(150, samples, latency_s=0.0)
    pool = make_pool(tasks, samples, enough=4, partial=True, max_age=3)
    parked = []
    trained = []
    for version in range(24):  # the run stops while some are under way, as runs do
        trained.append(pool.collect(version))
        parked.append(pool.parked())
        pool.publish(tiny, version + 1)
    groups = [group for step in trained for group in step]
    lengths = [len(t.turns) for group in groups for t in group.trajectories]
    sync_lengths = [n for task in tasks for n in task.meta["turns"]]
    assert ks(lengths, sync_lengths) < 1
    assert len(groups) > 90 and len({group.position for group in groups}) == len(groups)
    assert all(group.whole() for group in groups) and sum(parked) > 20
    ages = [version - group.born for version, step in enumerate(trained) for group in step]
    versions = [{turn.version for turn in t.turns} for group in groups for t in group.trajectories]
    assert max(ages) <= 3 and max(ages) >= 1 and any(len(v) > 1 for v in versions)
    # The same statistic sees the bias where there is one: a rule that keeps of each group what ends
    # first.
    first_to_finish = [n for task in tasks for n in sorted(task.meta["turns"])[:1]]
    assert ks(first_to_finish, sync_lengths) > 1


def test_budgets_and_overlap_train_each_exactly_once(make_pool, tiny):
    samples = 3
    tasks = scripted_tasks(24, samples, seed=1, latency_s=0.002)
    steps = train_on_all(
        make_pool(
            tasks, samples, workers=2, enough=6, partial=True, overlap=True, budget_tokens=100
        ),
        tiny,
    )
    assert_each_exactly_once(steps, tasks, samples)
    assert any(len(step) < 6 for step in steps)  # the budget ended a step before it was full
    turns = [
        (turn.version, version)
        for version, step in enumerate(steps)
        for group in step
        for t in group.trajectories
        for turn in t.turns
    ]
    assert all(sampled_by <= trained_by <= sampled_by + 5 for sampled_by, trained_by in turns)


def test_async_without_partial_is_strictly_on_policy(make_pool, tiny):
    tasks = scripted_tasks(8, 2, seed=2, latency_s=0.0)
    steps = train_on_all(make_pool(tasks, enough=4), tiny)
    assert_each_exactly_once(steps, tasks, 2)
    assert [len(step) for step in steps] == [4, 4]
    assert all(
        turn.version == version
        for version, step in enumerate(steps)
        for group in step
        for t in group.trajectories
        for turn in t.turns
    )


def through_a_checkpoint(state, model, tokenizer, folder) -> dict:
    """The state of a rank's rollouts, written and read as a run does."""
    run_folder.save(
        folder, 1, model, torch.optim.SGD(model.parameters()), tokenizer, {"rollouts": [state]}
    )
    return run_folder.share_of(run_folder.load_state(folder)["rollouts"], 0, 1, tasks=1)


@pytest.mark.parametrize(
    "more",
    [pytest.param({}, marks=pytest.mark.full), dict(context="summarize", context_budget=160)],
)
def test_parked_work_goes_on_token_for_token_from_a_checkpoint(
    make_pool, make_loop, tiny, tokenizer, tmp_path, more
):
    """Stopped in the middle, written to disk, continued by other processes: greedy decoding gives
    the uninterrupted run.
    """
    tasks = scripted_tasks(6, 2, seed=3, turns=lambda rng: int(rng.integers(3, 12)), latency_s=0.0)
    args = dict(temperature=0.0) | more
    pool = make_pool(tasks, enough=2, partial=True, budget_tokens=40, args=args)
    first = pool.collect(0)
    state = pool.state()
    assert pool.parked() > 0 and len(first) >= 1
    saved = {group["position"] for group in state["groups"]}
    assert saved >= {group.position for group in first}  # collected, but not trained yet
    pool.publish(tiny, 1)
    state = through_a_checkpoint(pool.state(), tiny, tokenizer, tmp_path)
    pool.close()
    again = make_pool(tasks, enough=2, partial=True, args=args, version=1, state=state)
    steps = [first] + train_on_all(again, tiny, version=1)
    assert_each_exactly_once(steps, tasks, 2)
    loop = make_loop(RolloutArgs(**ARGS | args))
    groups = [group for step in steps for group in step]
    for group in groups:
        whole = play(loop, new_group(tasks[group.position], group.position, 2, 0).trajectories)
        for fresh, parked in zip(whole, group.trajectories):
            assert actions_of(fresh) == actions_of(parked)
            assert [s.ids for s in fresh.segments] == [s.ids for s in parked.segments]
    if more:
        assert max(len(t.segments) for group in groups for t in group.trajectories) > 2


def test_a_group_survives_a_checkpoint(tiny, tokenizer, tmp_path):
    group = new_group(scripted_tasks(1, 2)[0], 5, 2, 0, version=3)
    call = {"name": "wait", "arguments": {}}
    turn = Turn([1, 2], [-0.5, -0.25], 3, observation_ids=[4], calls=[call], results=["waited"])
    group.trajectories[0].turns.append(turn)
    group.trajectories[0].memory = {"notes_turns": [1], "python": b"\0\xff"}
    group.trajectories[1].memory = {"python": b""}  # a session that has not begun
    state = {"next_number": 7, "groups": [asdict(group)]}
    state = through_a_checkpoint(state, tiny, tokenizer, tmp_path)
    assert state["next_number"] == 7 and [group_from(plain) for plain in state["groups"]] == [group]


# ------------------------------------------------------------------------------------------- faults


def kill_workers(pool, times, seed=0):
    """SIGKILL a random worker at random moments, in a thread; returns the thread. Most of them are
    in the middle of trajectories, every fifth may still be starting.
    """
    rng = random.Random(seed)
    killed = set()  # one that was killed and is not yet replaced must not be killed again

    def kill():
        for number in range(times):
            time.sleep(rng.uniform(0.0, 0.5))
            pids = []
            while not pids:
                time.sleep(0.01)
                workers = [worker for worker in pool.workers if worker.keys or number % 5 == 4]
                pids = [w.process.pid for w in workers if w.process.pid not in killed]
            time.sleep(rng.uniform(0.0, 0.05))
            killed.add(pid := rng.choice(pids))
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def test_killed_workers_are_replaced_and_nothing_is_lost_or_doubled(
    make_pool, tiny, capfd, monkeypatch, full
):
    kills = 100 if full else 3
    # We kill faster than a fault would: several in a row mean nothing.
    monkeypatch.setattr("workers.MAX_DEATHS", 10 * kills)
    samples = 2
    tasks = scripted_tasks(200 * kills, samples, seed=4, latency_s=0.02)
    pool = make_pool(tasks, samples, workers=2, enough=4, partial=True)
    killer = kill_workers(pool, kills)
    steps = []
    while killer.is_alive() or pool.restarts < kills:
        steps.append(pool.collect(len(steps)))
        pool.publish(tiny, len(steps))
        assert steps[-1], "more tasks are needed"
    pool.next_group = lambda n, version: None  # enough: play what is under way to its end
    steps += train_on_all(pool, tiny, len(steps))
    assert pool.restarts == kills
    assert_each_exactly_once(steps, tasks[: pool.next_number], samples)
    said = capfd.readouterr().err
    assert said.count("was killed by SIGKILL: replaced") == kills and "Traceback" not in said
    handed_out_again = sum(int(n) for n in re.findall(r"replaced, (\d+) trajectories", said))
    attempts = sum(t.key[4] for step in steps for group in step for t in group.trajectories)
    assert attempts == handed_out_again > 0  # each loss changes the draws of what was lost


@pytest.mark.full
def test_a_silent_worker_is_replaced(make_pool, tiny):
    tasks = scripted_tasks(8, 2, seed=5, latency_s=0.05)
    pool = make_pool(tasks, enough=8)
    pool.top_up(0, pool.enough)
    while not all(worker.keys for worker in pool.workers):  # all are ready and have work
        pool.pump(0.1)
    stopped = pool.workers[0].process.pid
    os.kill(stopped, signal.SIGSTOP)
    pool.silence_s = 2.0
    while psutil.pid_exists(stopped):
        pool.pump(0.1)
    pool.silence_s = 600.0
    assert_each_exactly_once(train_on_all(pool, tiny), tasks, 2)
    assert pool.restarts >= 1  # on a slow machine others may have seemed silent too


class BrokenLoop(ScriptedLoop):
    def read_turn(self, trajectory):
        raise KeyError("a bug in the agent loop")


def test_a_bug_in_a_worker_is_one_line(make_pool):
    pool = make_pool(scripted_tasks(4, 2), loop=BrokenLoop)
    line = (
        r"rollout worker 0 failed: "
        r"KeyError: 'a bug in the agent loop' \(test_workers.py:\d+\)$"
    )
    with pytest.raises(WorkerError, match=line):
        pool.collect(0)
    pool.close()
    assert not multiprocessing.active_children()


class DyingLoop(ScriptedLoop):
    def read_turn(self, trajectory):
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_all_die_stop_the_run(make_pool, monkeypatch):
    monkeypatch.setattr("workers.MAX_DEATHS", 2)
    line = "2 workers in a row were lost before a trajectory was finished"
    with pytest.raises(WorkerError, match=line):
        make_pool(scripted_tasks(4, 2), loop=DyingLoop).collect(0)


def hang_or_wait(seconds):
    if seconds > 1:
        threading.Event().wait()  # for ever
    return "waited"


class HangingToolbox(ScriptedToolbox):
    def tools_for(self, trajectory):
        return {"wait": hang_or_wait}


class HangingLoop(ScriptedLoop):
    toolbox_type = HangingToolbox


@pytest.mark.parametrize("lockstep", [True, False])
def test_a_tool_that_hangs_is_given_up(make_loop, lockstep):
    def tasks(count, latency_s):
        return scripted_tasks(count, 2, turns=lambda rng: 3, latency_s=latency_s)

    loop = make_loop(RolloutArgs(**ARGS | dict(tool_timeout_s=0.5)), HangingLoop, lockstep)
    started = time.monotonic()
    groups = [new_group(task, n, 2, 0) for n, task in enumerate(tasks(1, 9.0) + tasks(2, 0.0))]
    ended = play(loop, [t for group in groups for t in group.trajectories])
    assert time.monotonic() - started < 30 and all(len(t.turns) == 3 for t in ended)
    for t in ended:
        hung = t.task.meta["latency_s"] == 9.0
        said = ["error: no answer within 0.5 s"] if hung else ["waited"]
        assert all(turn.results == said and turn.faults == hung for turn in t.turns[:-1])


def test_a_trajectory_that_takes_too_long_is_left_out(make_loop):
    loop = make_loop(RolloutArgs(**ARGS | dict(trajectory_timeout_s=0.2)))
    [task] = scripted_tasks(1, 2, turns=lambda rng: 50, latency_s=0.15)
    trajectories = play(loop, new_group(task, 0, 2, 0).trajectories)
    assert all(t.status == "tool_fault" and len(t.turns) < 5 for t in trajectories)


# ----------------------------------------------------------------------------------- python session


class LatePython(Python):
    """The session changes a while before the result is there."""

    def __call__(self, code):
        result = super().__call__(code)
        time.sleep(0.05)
        return result


class PythonToolbox(ScriptedToolbox):
    def tools_for(self, trajectory):
        return {"python": LatePython(trajectory.memory)}


class CountingLoop(ScriptedLoop):
    """x = 1, then x += 1 in each turn."""

    toolbox_type = PythonToolbox

    def read_turn(self, trajectory):
        code = "x = 1\nx" if len(trajectory.turns) == 1 else "x += 1\nx"
        return [ToolCall("python", {"code": code}) for _ in super().read_turn(trajectory)]


def results_of(trajectory) -> list[str]:
    return [result for turn in trajectory.turns for result in turn.results]


@pytest.mark.parametrize("answered", [True, False])
def test_a_python_session_goes_on_in_another_process(make_loop, answered):
    """Parked behind a result, and parked while the code runs: then it runs again, once."""
    [task] = scripted_tasks(1, 1, turns=lambda rng: 5)
    [whole] = play(
        make_loop(RolloutArgs(**ARGS), CountingLoop), new_group(task, 0, 1, 0).trajectories
    )
    assert results_of(whole) == ["1", "2", "3", "4"]

    loop = make_loop(RolloutArgs(**ARGS), CountingLoop, lockstep=False)
    [live] = new_group(task, 0, 1, 0).trajectories
    loop.add([live])
    while len(live.turns) < 3:
        loop.step()
        if len(live.turns) == 2:
            before = live.memory.get("python")
    if answered:
        while not live.turns[-1].results:
            loop.step(hold=True)
    else:
        deadline = time.monotonic() + 20
        while live.memory["python"] == before and time.monotonic() < deadline:
            time.sleep(0.001)
    [parked] = pickle.loads(pickle.dumps(loop.held()))
    assert results_of(parked) == (["1", "2", "3"] if answered else ["1", "2"])
    [parked] = play(make_loop(RolloutArgs(**ARGS), CountingLoop), [parked])
    assert results_of(parked) == results_of(whole) and actions_of(parked) == actions_of(whole)


def test_python_sessions_go_on_in_another_worker(make_pool, tiny, tokenizer, tmp_path):
    tasks = scripted_tasks(4, 2, seed=6, turns=lambda rng: int(rng.integers(3, 12)))
    flags = dict(enough=2, partial=True, overlap=True, loop=CountingLoop)
    pool = make_pool(tasks, budget_tokens=30, **flags)
    first = pool.collect(0)
    pool.publish(tiny, 1)
    state = pool.state()  # with overlap the workers are asked while tools run
    assert pool.parked() > 0
    pool.close()
    state = through_a_checkpoint(state, tiny, tokenizer, tmp_path)
    again = make_pool(tasks, version=1, state=state, **flags)
    steps = [first] + train_on_all(again, tiny, version=1)
    assert_each_exactly_once(steps, tasks, 2)
    for t in (t for step in steps for group in step for t in group.trajectories):
        assert results_of(t) == [str(n) for n in range(1, len(t.turns))]
