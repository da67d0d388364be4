"""Runs the commands of the README on a small setting: the nano model, the embedded world, real HTTP, a real sandbox."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from support.run_folder import load_state

SMALL = [
    "--tasks_per_step",
    "2",
    "--samples",
    "4",
    "--eval_tasks",
    "0",
    "--save_every",
    "1",
    "--max_turns",
    "4",
    "--dev_tasks",
    "data/dev.jsonl",
    "--train_tasks",
    "data/dev.jsonl",
]


def launch(*arguments, processes=1):
    """accelerate launch train.py …; should it hang, each of its processes says where, and the test fails with that."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        str(processes),
        "train.py",
        *map(str, arguments),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
    )
    try:
        printed, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        family = [
            psutil.Process(process.pid),
            *psutil.Process(process.pid).children(recursive=True),
        ]
        for action in (
            "suspend launchers",
            "abort",
            "kill",
        ):  # a launcher would end the second rank as soon as the first is aborted
            for each in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    is_launcher = (
                        "torch.distributed.run" in each.cmdline()
                        or "accelerate.commands.launch" in each.cmdline()
                    )
                    if action == "suspend launchers" and is_launcher:
                        each.suspend()
                    elif action == "abort" and not is_launcher:
                        each.send_signal(
                            signal.SIGABRT
                        )  # faulthandler writes down the stacks of all threads
                        time.sleep(0.5)
                    elif action == "kill":
                        each.kill()
        printed, errors = process.communicate(timeout=60)
        pytest.fail(f"train.py hangs: {printed}\n{errors[-20000:]}")
    return subprocess.CompletedProcess(command, process.returncode, printed, errors)


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def same_numbers(a, b):
    timing = ("rollout_s", "train_s", "tokens_per_s", "idle_share")
    return [{k: v for k, v in m.items() if k not in timing} for m in a] == [
        {k: v for k, v in m.items() if k not in timing} for m in b
    ]


def same_weights(a, b):
    """Whether two model folders hold the same bits."""
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = launch(*SMALL, "--steps", 3, "--out", out, "--check_logprobs", "True")
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_a_run_leaves_what_the_readme_promises(whole_run):
    out, printed = whole_run
    assert {p.name for p in out.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "curves.png",
        "trajectories.jsonl",
        "checkpoint",
        "state",
    }
    rows = metrics(out)
    assert [m["step"] for m in rows] == [1, 2, 3]
    for key in (
        "reward",
        "pass_rate",
        "turns",
        "tokens",
        "entropy",
        "kept_negatives",
        "stale_share",
        "parked",
        "idle_share",
        "rollout_s",
        "train_s",
        "tokens_per_s",
    ):
        assert all(key in m for m in rows)
    gaps = [float(line.split()[-1]) for line in printed.splitlines() if "trainer - sampler" in line]
    assert len(gaps) == 3 and max(gaps) < 1e-4
    assert not same_weights(ROOT / "data/nano", out / "checkpoint")


def test_resume_is_bitwise_equal(whole_run, tmp_path):
    out, _ = whole_run
    first = launch(*SMALL, "--steps", 1, "--out", tmp_path / "r")
    assert first.returncode == 0, first.stderr[-2000:]
    (tmp_path / "r/state/step-000009-0123456789abcdef.pt").write_bytes(b"torn by a crash")
    second = launch("--resume", tmp_path / "r", "--steps", 3)
    assert second.returncode == 0 and "damaged" in second.stderr, second.stderr[-2000:]
    assert same_numbers(metrics(out), metrics(tmp_path / "r"))
    assert same_weights(out / "checkpoint", tmp_path / "r/checkpoint")


def test_two_ranks_equal_one(whole_run, tmp_path):
    done = launch(*SMALL, "--steps", 1, "--out", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one = launch(*SMALL, "--steps", 1, "--out", tmp_path / "one")
    assert one.returncode == 0
    a, b = metrics(tmp_path / "one")[0], metrics(tmp_path / "two")[0]
    for key in ("reward", "pass_rate", "turns", "tokens", "kept_negatives"):
        assert a[key] == pytest.approx(b[key])
    base = load_file(ROOT / "data/nano/model.safetensors")
    a, b = (load_file(tmp_path / name / "checkpoint/model.safetensors") for name in ("one", "two"))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5
    assert max(float((a[name] - base[name]).abs().max()) for name in a) > 1e-5


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "./nowhere"], "cannot load the model"),
        (["--train_tasks", "nowhere.jsonl"], "no task file"),
        (["--resume", "nowhere"], "no run there"),
        (["--temperature", "0"], "--temperature"),
        (["--reward", "nowhere.py:f"], "--reward"),
        (["--no_such_flag", "1"], "unknown flag --no_such_flag"),
        (["--steps", "many"], "--steps"),
    ],
)
def test_bad_input_gives_a_clear_line(arguments, words):
    done = subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and words in done.stderr


def test_the_loop_raises_what_is_rewarded(tmp_path):
    """A reward for giving an answer within two turns makes such trajectories more frequent."""
    (tmp_path / "soon.py").write_text(
        "def soon(trajectory):\n    return float(len(trajectory.turns) <= 2 and trajectory.status == 'answered')\n"
    )
    done = launch(
        "--tasks_per_step",
        4,
        "--samples",
        8,
        "--eval_tasks",
        0,
        "--steps",
        9,
        "--max_turns",
        4,
        "--train_tasks",
        "data/dev.jsonl",
        "--reward",
        f"{tmp_path}/soon.py:soon",
        "--out",
        tmp_path / "run",
        "--learning_rate",
        "1e-3",
        "--warmup",
        "1",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rewards = [m["reward"] for m in metrics(tmp_path / "run")]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards


# ------------------------------------------------------------------------------------------------- rollout processes

ASYNC = [
    *SMALL,
    "--rollout",
    "async",
    "--partial",
    "--workers",
    "1",
    "--slots",
    "32",
    "--max_age",
    "2",
]


def our_processes(marker):
    """Processes, of this run only, that are still there: the trainer's workers inherit its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("RUN_MARKER") == marker
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            pass
    return found


def start_train(marker, *arguments):
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RUN_MARKER": marker},
    )


def test_an_async_run_goes_on_after_a_kill_with_its_parked_work(tmp_path):
    out = tmp_path / "a"
    first = start_train(
        str(tmp_path), *ASYNC, "--steps", 1000, "--out", out, "--overlap", "--stale", "is"
    )
    deadline = time.time() + 240
    while (
        len(list((out / "state").glob("step-*.pt"))) < 2
        and first.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.02)  # a checkpoint each step: the kill comes near or in the middle of one
    first.kill()
    assert "Traceback" not in first.communicate()[1]
    deadline = time.time() + 10
    while our_processes(str(tmp_path)) and time.time() < deadline:
        time.sleep(0.1)
    assert not our_processes(str(tmp_path))  # workers do not outlive a trainer that was killed
    steps_done = max(int(path.name[5:11]) for path in (out / "state").glob("step-*.pt"))
    [kept] = load_state(out)["rollouts"]  # of the one rank
    assert any(
        trajectory["turns"] for group in kept["groups"] for trajectory in group["trajectories"]
    )
    second = launch("--resume", out, "--steps", steps_done + 1)
    assert second.returncode == 0, second.stderr[-2000:]
    rows = metrics(out)
    assert [m["step"] for m in rows] == list(range(1, steps_done + 2))
    for m in rows:
        assert sum(m["staleness"].values()) == pytest.approx(1) and m[
            "stale_share"
        ] == pytest.approx(1 - m["staleness"].get("0", 0))
        assert 0 <= m["idle_share"] <= 1 and 0 <= m["trained_share"] <= 1 and m["restarts"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything_with_one_line(tmp_path, number):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("ignored here, as under nohup, and so by what is started here")
    process = start_train(str(tmp_path), *ASYNC, "--steps", 1000, "--out", tmp_path / "s")
    deadline = time.time() + 120
    while (
        len(our_processes(str(tmp_path))) < 2 and process.poll() is None and time.time() < deadline
    ):
        time.sleep(0.05)  # as soon as the first worker is being started
    if number == signal.SIGTERM:
        while not (tmp_path / "s/metrics.jsonl").exists() and time.time() < deadline:
            time.sleep(0.05)
    process.send_signal(number)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 30 and process.returncode != 0  # 10 s on a quiet machine
    assert (
        "Traceback" not in errors
        and len(
            [line for line in errors.split("\r")[-1].splitlines() if "train.py: stopped" in line]
        )
        == 1
    ), errors[-1000:]
    deadline = time.time() + 10
    while our_processes(str(tmp_path)) and time.time() < deadline:
        time.sleep(0.1)
    assert not our_processes(str(tmp_path))


STOPS_ITSELF = """
import os, pathlib, signal, sys
import torch
from reward import reward
train, here = sys.modules["__main__"], pathlib.Path(__file__).parent
real = TARGET

def stop_once(*arguments, **named):
    if (here / "s/metrics.jsonl").exists() and not (here / "stopped").exists():  # in the second step
        (here / "stopped").touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*arguments, **named)

TARGET = stop_once
"""


@pytest.mark.parametrize(
    "mode, where", [("async", "train.collate"), ("sync", "torch.optim.AdamW.step")]
)
def test_a_run_stopped_in_an_update_loses_no_step(tmp_path, whole_run, mode, where):
    """Saved is the state before that update, with the groups that it was being made of, or the one after it; --resume goes on from there."""
    (tmp_path / "stop.py").write_text(STOPS_ITSELF.replace("TARGET", where))
    out = tmp_path / "s"
    flags = [
        *(SMALL if mode == "sync" else ASYNC),
        "--save_every",
        1000,
        "--steps",
        20,
        "--reward",
        f"{tmp_path}/stop.py:reward",
        "--out",
        out,
    ]
    first = start_train(str(tmp_path), *flags)
    try:
        _, errors = first.communicate(timeout=200)
    finally:
        first.kill()
    assert (
        (tmp_path / "stopped").exists()
        and first.returncode != 0
        and f"--resume {out}" in errors
        and "Traceback" not in errors
    ), errors[-2000:]
    state = load_state(out)
    assert state["step"] == (1 if where == "train.collate" else 2)  # the step itself is ended first
    second = launch("--resume", out, "--steps", 3)
    assert second.returncode == 0, second.stderr[-2000:]
    if mode == "sync":
        assert same_weights(whole_run[0] / "checkpoint", out / "checkpoint")
    else:
        [kept] = state["rollouts"]
        whole = {
            group["trajectories"][0]["task"]["id"]
            for group in kept["groups"]
            if all(t["status"] != "running" for t in group["trajectories"])
        }
        trained = {
            row["id"]
            for row in map(json.loads, (out / "trajectories.jsonl").read_text().splitlines())
            if row["step"] == 2
        }
        assert whole and whole <= trained


def test_steps_without_a_finite_gradient_change_nothing_and_end_the_run(tmp_path):
    (tmp_path / "huge.py").write_text(
        "def huge(trajectory):\n    return 1e300 if trajectory.key[-1] % 2 else -1e300\n"
    )
    done = launch(
        *SMALL, "--steps", 9, "--reward", f"{tmp_path}/huge.py:huge", "--out", tmp_path / "r"
    )
    assert (
        done.returncode != 0
        and done.stdout.count("the step was skipped") == 3
        and "lower --learning_rate" in done.stderr
    )
    assert same_weights(ROOT / "data/nano", tmp_path / "r/checkpoint")


def test_a_reward_that_fails_is_one_line(tmp_path):
    (tmp_path / "bad.py").write_text("def bad(trajectory):\n    return 1 / 0\n")
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            *SMALL,
            "--steps",
            "1",
            "--out",
            str(tmp_path / "r"),
            "--reward",
            f"{tmp_path}/bad.py:bad",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert (
        "train.py: the reward failed on task" in done.stderr
        and "ZeroDivisionError: division by zero (bad.py:2)" in done.stderr
    )
