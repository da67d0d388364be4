import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from dataclasses import asdict

import numpy as np
import psutil
import pytest
import torch
from scripted import ScriptedToolbox, scripted_tasks, scripted_turn, turns_of

from context import Trajectory, Turn
from engine import Engine
from rollout import RolloutArgs, ToolThreads, next_prompt, play, rollout, run_turn, take_results
from support.toolbox import Toolbox
from tools import ToolCall
from workers import (
    Channel,
    Rollouts,
    Setup,
    SharedWeights,
    WorkerError,
    group_from,
    make_group,
    signals_later,
)

ARGS = dict(slots=16, max_new_tokens=2, max_context=2000, max_turns=99, tool_steps=1)


@pytest.fixture
def tiny_path(tiny, tokenizer, tmp_path):
    tiny.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def make_pool(tiny, tiny_path):
    """Rollouts over scripted tasks; closed when the test ends."""
    pools = []

    def make(
        tasks,
        samples=2,
        workers=1,
        enough=4,
        act=scripted_turn,
        toolbox=ScriptedToolbox,
        args=None,
        **flags,
    ):
        setup = Setup(tiny_path, RolloutArgs(**ARGS | (args or {})), toolbox=toolbox, act=act)
        pools.append(
            Rollouts(
                tiny,
                setup,
                workers,
                lambda n, version: (
                    make_group(tasks[n], n, version, samples, 0) if n < len(tasks) else None
                ),
                enough,
                **flags,
            )
        )
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


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
    assert sorted(group.number for group in groups) == list(range(len(tasks)))
    for group in groups:
        assert group.whole() and len(group.trajectories) == samples
        assert [t.key[3] for t in group.trajectories] == list(range(samples))
        assert all(
            len(t.turns) == turns_of(t) and t.task == tasks[group.number]
            for t in group.trajectories
        )


def ks(a, b):
    """Two-sample Kolmogorov-Smirnov statistic over its 1% critical value: above 1 the samples differ."""
    grid = np.union1d(a, b)
    cdf_a, cdf_b = (np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (a, b))
    return np.abs(cdf_a - cdf_b).max() / (1.63 * np.sqrt((len(a) + len(b)) / (len(a) * len(b))))


# ------------------------------------------------------------------------------------------------- what processes share


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
    weights.buffer[100] += 1  # a write that never ended leaves a checksum that does not fit
    with pytest.raises(RuntimeError, match="no whole weights"):
        weights.read(tiny, patience_s=0.05)


# ------------------------------------------------------------------------------------------------------------ schedule


def test_no_completion_time_bias_groups_whole_age_bounded(make_pool, tiny):
    """With a fixed policy the lengths of trained trajectories are those of the synchronous run, over many partial steps."""
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
    assert len(groups) > 90 and len({group.number for group in groups}) == len(groups)
    assert all(group.whole() for group in groups) and sum(parked) > 20
    ages = [version - group.born for version, step in enumerate(trained) for group in step]
    versions = [{turn.version for turn in t.turns} for group in groups for t in group.trajectories]
    assert max(ages) <= 3 and max(ages) >= 1 and any(len(v) > 1 for v in versions)
    # The same statistic sees the bias where there is one: a rule that keeps of each group what ends first.
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


@pytest.mark.parametrize("more", [{}, dict(context="summarize", context_budget=160)])
def test_parked_work_goes_on_token_for_token_from_a_checkpoint(make_pool, tiny, chat, more):
    """Stopped in the middle, written down as plain data, continued by other processes: greedy decoding gives the uninterrupted run."""
    tasks = scripted_tasks(6, 2, seed=3, turns=lambda rng: int(rng.integers(3, 12)), latency_s=0.0)
    args = dict(temperature=0.0) | more
    pool = make_pool(tasks, enough=2, partial=True, budget_tokens=40, args=args)
    first = pool.collect(0)
    state = pool.state()
    assert pool.parked() > 0 and len(first) >= 1
    assert {group["number"] for group in state["groups"]} >= {
        group.number for group in first
    }  # collected, but not trained yet
    pool.publish(tiny, 1)
    state = pool.state()
    pool.close()
    torch.save(state, (path := os.path.join(pool.setup.policy, "state.pt")))
    again = make_pool(
        tasks,
        enough=2,
        partial=True,
        args=args,
        version=1,
        state=torch.load(path, weights_only=True),
    )
    steps = [first] + train_on_all(again, tiny, version=1)
    assert_each_exactly_once(steps, tasks, 2)
    rollout_args = RolloutArgs(**ARGS | args)
    engine = Engine(
        tiny,
        chat.end_id,
        rollout_args.slots,
        rollout_args.max_context,
        rollout_args.max_new_tokens,
        0.0,
        chat.before_question,
    )
    for group in (group for step in steps for group in step):
        fresh = make_group(group.trajectories[0].task, group.number, 0, 2, 0).trajectories
        rollout(engine, chat, fresh, ScriptedToolbox(), rollout_args, act=scripted_turn)
        assert [[turn.action_ids for turn in t.turns] for t in fresh] == [
            [turn.action_ids for turn in t.turns] for t in group.trajectories
        ]
        assert [[s.ids for s in t.segments] for t in fresh] == [
            [s.ids for s in t.segments] for t in group.trajectories
        ]
    assert (
        not more
        or max(len(t.segments) for step in steps for group in step for t in group.trajectories) > 2
    )


def test_a_signal_waits_until_a_worker_has_been_started():
    """Another thread, which blocks no signal, receives it; the main thread must not be interrupted even so."""
    end = threading.Event()
    threading.Thread(target=end.wait, daemon=True).start()
    reached = False
    try:
        with pytest.raises(KeyboardInterrupt):
            with signals_later():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
                reached = True
            reached = False  # the signal comes at the end of the block, not later
    finally:
        end.set()
    assert reached


def test_a_group_survives_plain_data():
    task = scripted_tasks(1, 2)[0]
    group = make_group(task, 5, 3, 2, 0)
    group.trajectories[0].turns.append(
        Turn([1, 2], [-0.5, -0.25], 3, [4], [{"name": "wait", "arguments": {}}], ["waited"])
    )
    group.trajectories[0].memory["notes_turns"] = [1]
    assert group_from(asdict(group)) == group


# -------------------------------------------------------------------------------------------------------------- faults


def kill_workers(pool, times, seed=0):
    """SIGKILL a random worker at random moments, in a thread; returns the thread."""
    rng = random.Random(seed)

    def lives(pid):  # one that was killed and not yet replaced does not count as killed again
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def kill():
        for _ in range(times):
            time.sleep(rng.uniform(0.0, 1.0))
            while not (
                pids := [
                    worker.process.pid
                    for worker in pool.workers
                    if (worker.ready or rng.random() < 0.01) and lives(worker.process.pid)
                ]
            ):
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 0.2))
            os.kill(rng.choice(pids), signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def test_killed_workers_are_replaced_and_nothing_is_lost_or_doubled(
    make_pool, tiny, capfd, monkeypatch, kills=int(os.environ.get("KILLS", 5))
):
    """KILLS=100 pytest tests/test_workers.py -k killed: the long version."""
    monkeypatch.setattr(
        "workers.MAX_DEATHS", 10 * kills
    )  # we kill faster than a fault would: several in a row mean nothing
    samples = 2
    tasks = scripted_tasks(40 * kills, samples, seed=4, latency_s=0.02)
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


def broken_turn(trajectory, *rest):
    raise KeyError("a bug in the agent loop")


def test_a_bug_in_a_worker_is_one_line(make_pool):
    pool = make_pool(scripted_tasks(4, 2), act=broken_turn)
    with pytest.raises(
        WorkerError,
        match=r"rollout worker 0 failed: KeyError: 'a bug in the agent loop' \(test_workers.py:\d+\)",
    ):
        pool.collect(0)
    pool.close()
    assert not multiprocessing.active_children()


def dying_turn(trajectory, *rest):
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_all_die_stop_the_run(make_pool, monkeypatch):
    monkeypatch.setattr("workers.MAX_DEATHS", 2)
    with pytest.raises(
        WorkerError, match="2 workers in a row were lost before a trajectory was finished"
    ):
        make_pool(scripted_tasks(4, 2), act=dying_turn).collect(0)


def hang_or_wait(seconds):
    if seconds > 1:
        threading.Event().wait()  # for ever
    return "waited"


class HangingToolbox(ScriptedToolbox):
    def tools_for(self, trajectory):
        return {"wait": hang_or_wait}


@pytest.mark.parametrize("lockstep", [True, False])
def test_a_tool_that_hangs_is_given_up(tiny, chat, make_engine, lockstep):
    args = RolloutArgs(**ARGS | dict(tool_timeout_s=2.0))
    tasks = scripted_tasks(1, 2, turns=lambda rng: 3, latency_s=9.0) + scripted_tasks(
        2, 2, turns=lambda rng: 3, latency_s=0.0
    )
    left = [t for n, task in enumerate(tasks) for t in make_group(task, n, 0, 2, 0).trajectories]
    ended = []
    started = time.monotonic()
    play(
        make_engine(tiny, args),
        chat,
        HangingToolbox(),
        args,
        lambda n: [left.pop() for _ in range(min(n, len(left)))] if left else None,
        ended.append,
        lockstep=lockstep,
        act=scripted_turn,
    )
    assert (
        time.monotonic() - started < 30
        and len(ended) == 6
        and all(len(t.turns) == 3 for t in ended)
    )
    hung = [t for t in ended if t.task.meta["latency_s"] == 9.0]
    assert all(
        turn.results == ["error: no answer within 2 s"] and turn.faults == 1
        for t in hung
        for turn in t.turns[:-1]
    )
    assert all(
        turn.results == ["waited"] and turn.faults == 0
        for t in ended
        if t not in hung
        for turn in t.turns[:-1]
    )


def test_a_trajectory_that_takes_too_long_is_left_out(tiny, chat, make_engine):
    args = RolloutArgs(**ARGS | dict(trajectory_timeout_s=0.2))
    trajectories = make_group(
        scripted_tasks(1, 2, turns=lambda rng: 50, latency_s=0.15)[0], 0, 0, 2, 0
    ).trajectories
    rollout(make_engine(tiny, args), chat, trajectories, ScriptedToolbox(), args, act=scripted_turn)
    assert all(t.status == "tool_fault" and len(t.turns) < 5 for t in trajectories)


def test_hung_threads_are_replaced():
    threads = ToolThreads(2)
    hung = [threads.submit(threading.Event().wait) for _ in range(2)]
    waiting = threads.submit(int, "7")
    assert not waiting.done()
    for future in hung:
        threads.give_up(future)
    assert threads.submit(int, "8").result(timeout=5) == 8 and waiting.result(timeout=5) == 7
    threads.close()


# ------------------------------------------------------------------------------------------------------- python session


def test_a_python_session_is_replayed_where_a_trajectory_goes_on(chat, dev_tasks):
    """Variables of a session live in one process; elsewhere the earlier code runs again before the next code does."""
    trajectory = Trajectory(dev_tasks[0], (0, 0, 0, 0), head_ids=[1])
    args = RolloutArgs()
    calls = [
        ToolCall("python", {"code": "x = 40\nprint('once')"}),
        ToolCall("python", {"code": "x = x + 1"}),
    ]

    def turn(toolbox, calls, replay):
        trajectory.turns.append(Turn([5], [-1.0], 0, calls=[asdict(call) for call in calls]))
        take_results(trajectory, run_turn(calls, toolbox.tools_for(trajectory), replay), chat, args)

    first, second = Toolbox(), Toolbox()
    turn(first, calls, [])
    first.close_all()
    kept = pickle.loads(pickle.dumps(trajectory))
    replay = [
        ToolCall(**call) for turn in kept.turns for call in turn.calls if call["name"] == "python"
    ]
    turn(second, [ToolCall("python", {"code": "print(x + 1)"})], replay)
    assert trajectory.turns[-1].results == ["42"] and trajectory.turns[0].results == [
        "once",
        "(no output)",
    ]
    second.close_all()


class PythonToolbox(Toolbox):
    def index_of(self, task):
        from scripted import wait

        class Wait:
            name = "wait"
            __call__ = staticmethod(wait)

        return Wait(), Wait()


def counting_turn(trajectory, ids, logprobs, version, chat, tools):
    """x = 1, then x += 1 in each turn; the fifth turn ends."""
    trajectory.segments[-1].append(ids, len(trajectory.turns), logprobs)
    trajectory.turns.append(Turn(ids, logprobs, version))
    if len(trajectory.turns) == 5:
        trajectory.status = "answered"
        return None
    code = "x = 1\nx" if len(trajectory.turns) == 1 else "x += 1\nx"
    trajectory.turns[-1].calls = [{"name": "python", "arguments": {"code": code}}]
    return [ToolCall(**call) for call in trajectory.turns[-1].calls]


def test_play_replays_and_reruns_what_was_cut_off(tiny, chat, make_engine):
    args = RolloutArgs(**ARGS)
    trajectory = make_group(scripted_tasks(1, 1)[0], 0, 0, 1, 0).trajectories[0]
    rollout(make_engine(tiny, args), chat, [trajectory], PythonToolbox(), args, act=counting_turn)
    assert [turn.results for turn in trajectory.turns] == [["1"], ["2"], ["3"], ["4"], []]
    for turns, answered in (
        (2, True),
        (3, False),
    ):  # parked after the tool had answered, and before
        parked = make_group(trajectory.task, 0, 0, 1, 0).trajectories[0]
        parked.head_ids = list(trajectory.head_ids)
        for number in range(turns):
            next_prompt(parked, chat, args)
            counting_turn(
                parked,
                list(trajectory.turns[number].action_ids),
                list(trajectory.turns[number].logprobs),
                0,
                chat,
                {},
            )
            if number < turns - 1 or answered:
                take_results(parked, [(trajectory.turns[number].results[0], False)], chat, args)
        parked = pickle.loads(pickle.dumps(parked))
        rollout(make_engine(tiny, args), chat, [parked], PythonToolbox(), args, act=counting_turn)
        assert [turn.results for turn in parked.turns] == [
            turn.results for turn in trajectory.turns
        ]
        assert [turn.action_ids for turn in parked.turns] == [
            turn.action_ids for turn in trajectory.turns
        ]


def test_workers_get_the_tools_that_the_flags_ask_for(monkeypatch):
    """Not one flag may be lost between the trainer's tools and a worker's."""
    monkeypatch.setattr("rollout.Toolbox", lambda *given: given)
    args = RolloutArgs(
        corpus="c.db",
        live=True,
        search_results=7,
        page_chars=8,
        search="searxng",
        search_url="http://s.test",
        unsafe_python=True,
    )
    assert Setup("nano", args).toolbox(args) == (
        "c.db",
        True,
        7,
        8,
        "searxng",
        "http://s.test",
        True,
    )
