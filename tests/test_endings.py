"""How a run ends: signals set a flag, the loops look at it, and the user reads one line."""

import copy
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from scripted import ScriptedLoop, scripted_tasks
from test_train import ARGS, made_up_rows

from rollout import RolloutArgs, new_group, play
from support import endings
from support.curriculum import Curriculum
from support.run import Run
from support.run_folder import load_state
from train import Policy, TrainArgs, gradient
from workers import WorkerError

PROLOGUE = """
import signal, sys, threading, time
from support import endings
endings.listen("run.py")
print("listening", flush=True)
"""
# A loop that looks at the flag, as the agent loop does.
COOPERATIVE = """
try:
    while True:
        time.sleep(0.01)
        endings.check()
except endings.Stopped:
    print("stopped with", [int(number) for number in endings.received], flush=True)
"""
# A call into C that does not return. Its main thread runs no Python, so no handler of Python's.
STUCK = """
print("torch" in sys.modules, flush=True)
lock = threading.Lock()
lock.acquire()
lock.acquire()
"""


@pytest.fixture
def start():
    """start(code) runs a script that listens to signals, and returns it once it does."""
    processes = []

    def start_script(code: str, **options) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", PROLOGUE + code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        processes.append(process)
        assert process.stdout.readline() == "listening\n"
        return process

    yield start_script
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(condition, seconds=5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("number", endings.SIGNALS)
def test_a_signal_stops_a_loop_at_its_next_look(start, number):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("ignored here, as under nohup, and so by what is started here")
    process = start(COOPERATIVE)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=5)
    assert process.returncode == 0 and errors == ""
    assert printed == f"stopped with [{int(number)}]\n"


def test_a_second_signal_ends_at_once(start):
    process = start(STUCK)
    assert process.stdout.readline() == "False\n"  # endings needs nothing that is slow to import
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=endings.END_S - 2)
    assert process.returncode == 130 and errors == "run.py: stopped, without saving\n"


def test_a_launchers_signal_of_another_kind_is_not_a_second_one(start):
    process = start("time.sleep(0.8)" + COOPERATIVE)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=5)
    assert process.returncode == 0 and printed == "stopped with [2, 15]\n"


def test_what_does_not_end_is_ended(start):
    process = start("endings.END_S = 0.3" + STUCK)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 130
    assert errors == "run.py: stopped, in the middle of something that did not end\n"


def test_nohup_stays_in_force(start):
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = start(COOPERATIVE, preexec_fn=ignore)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None


CHILD = """
import subprocess
code = "import signal, time; signal.signal(2, lambda *_: print('child heard', flush=True));"
code += "print('child', flush=True); time.sleep(60); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
endings.children.append(child)
print(child.pid, flush=True)
"""


def test_other_ranks_get_our_signals_and_our_end(start):
    process = start(CHILD + STUCK)
    child = psutil.Process(int(process.stdout.readline()))
    assert sorted(process.stdout.readline() for _ in range(2)) == ["False\n", "child\n"]
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "child heard\n"
    process.send_signal(signal.SIGINT)
    process.wait(timeout=endings.END_S - 2)
    assert wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


DEAF = """
import subprocess
code = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"
with endings.deaf():
    subprocess.run([sys.executable, "-c", code])
print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))), flush=True)
"""


def test_a_process_that_starts_in_a_deaf_block_hears_nothing(start):
    process = start(DEAF + COOPERATIVE)
    assert process.stdout.readline() == f"{sorted(map(int, endings.SIGNALS))}\n"
    assert process.stdout.readline() == "[]\n"  # we hear again
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=5)[0] == "stopped with [15]\n"


ORPHAN = """
import os, subprocess
code = "import sys, time; from support import endings; endings.die_with_parent(int(sys.argv[1]));"
code += "print('ready', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code, str(os.getpid())])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_process_may_die_with_its_parent(start):
    process = start(ORPHAN)
    child = psutil.Process(int(process.stdout.readline()))
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    assert wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    late = start("endings.die_with_parent(1 << 22)")  # its parent is another one by now
    assert late.wait(timeout=5) == 1


# ------------------------------------------------------------------------- the loops and the run


def test_rollouts_stop_between_engine_steps(tiny, chat, make_engine, monkeypatch):
    (task,) = scripted_tasks(1, 2, turns=lambda rng: 50, latency_s=0.0)
    loop = ScriptedLoop(make_engine(tiny, RolloutArgs(slots=2)), chat, None, RolloutArgs(), True)
    trajectories = new_group(task, 0, 2, 0).trajectories
    step, steps = loop.step, []

    def stop_after_some(hold=False):
        steps.append(None)
        if len(steps) == 30:
            endings.received.append(signal.SIGINT)
        return step(hold)

    loop.step = stop_after_some
    monkeypatch.setattr(endings, "received", [])
    with pytest.raises(endings.Stopped):
        play(loop, trajectories)
    assert len(steps) == 30


def test_an_update_stops_between_micro_batches(tiny, monkeypatch):
    """No weight has changed then, because the optimizer has made no step."""
    model, rows = copy.deepcopy(tiny), made_up_rows(4)
    policy, passes = Policy(model, 1.0), []

    def stop_after_two(module, inputs, output):
        passes.append(None)
        if len(passes) == 2:
            endings.received.append(signal.SIGTERM)

    policy.register_forward_hook(stop_after_two)
    monkeypatch.setattr(endings, "received", [])
    args = TrainArgs(max_grad_norm=ARGS.max_grad_norm, micro_tokens=1)
    with pytest.raises(endings.Stopped):
        gradient(policy, Accelerator(cpu=True), rows, 1.0, args)
    assert len(passes) == 2
    assert all(map(torch.equal, model.parameters(), tiny.parameters()))


def ended(error, **state):
    """What the process ends with if this error is raised in a run: a line, or the error itself."""
    try:
        with Run(TrainArgs(), []) as run:
            vars(run).update(state)
            raise error
    except (SystemExit, Exception) as raised:
        return raised.code if isinstance(raised, SystemExit) else raised


def test_what_ends_a_run_is_one_line_or_a_traceback(tmp_path):
    assert ended(ValueError("--steps is wrong")) == "train.py: --steps is wrong"
    assert ended(OSError("no task file stopped.jsonl")) == "train.py: no task file stopped.jsonl"
    assert ended(endings.Stopped()) == "train.py: stopped before the first step"
    bug = ValueError("a bug in the middle of the run")
    assert ended(bug, began=True) is bug
    assert ended(SystemExit("train.py: said")) == "train.py: said"
    lost = WorkerError("rollout worker 0 failed")
    nothing = "nothing to go on with was saved yet"
    assert ended(lost, began=True) == f"train.py: rollout worker 0 failed; {nothing}"
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "step-000001-0.pt").touch()
    full = OSError(28, "No space left on device", "metrics.jsonl")
    assert ended(full, began=True, out=tmp_path) == (
        "train.py: No space left on device (metrics.jsonl); "
        f"go on with: accelerate launch train.py --resume {tmp_path}"
    )


def test_other_ranks_end_without_a_line():
    other = dict(accelerator=Accelerator(cpu=True), is_main=False)
    assert ended(endings.Stopped(), **other) == 1
    assert ended(ValueError("--steps is wrong"), **other) == 1


def test_a_stopped_run_saves_what_it_has_done(tmp_path, tiny, chat, monkeypatch):
    closed = []
    rollouts = SimpleNamespace(state=lambda ask: None, close=lambda: closed.append(True))
    learner = SimpleNamespace(model=tiny, chat=chat, policy=object())
    learner.optimizer = torch.optim.AdamW(tiny.parameters())
    state = dict(out=tmp_path, learner=learner, rollouts=rollouts, ranks=1, is_main=True)
    state |= dict(began=True, done=4, saved=2, curriculum=Curriculum([], 0, False))
    monkeypatch.setattr("support.run.draw_curves", lambda out: None)
    go_on = f"go on with: accelerate launch train.py --resume {tmp_path}"
    assert ended(endings.Stopped(), **state) == f"train.py: stopped after step 4; {go_on}"
    assert load_state(tmp_path)["step"] == 4 and closed == [True] and learner.policy is None

    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("support.run.run_folder.save", full)
    line = ended(endings.Stopped(), **state | {"done": 6})
    problem = "the last steps could not be saved: the disk is full"
    assert line == f"train.py: stopped after step 6; {problem}; {go_on}"
    # With several ranks and workers nobody knows what the others have under way.
    rollouts.state = lambda ask: {"groups": []}
    line = ended(endings.Stopped(), **state | {"done": 6, "ranks": 2})
    assert line == f"train.py: stopped after step 6; {go_on}"
    assert load_state(tmp_path)["step"] == 4
    assert os.listdir(tmp_path / "state") == [p.name for p in (tmp_path / "state").glob("step*4*")]
