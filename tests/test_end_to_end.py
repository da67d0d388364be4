"""Runs the commands of the README on a small setting: the nano model, the embedded world, real HTTP, a real sandbox."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

SMALL = ["--tasks_per_step", "2", "--samples", "4", "--eval_tasks", "0", "--save_every", "1", "--max_turns", "4", "--dev_tasks", "data/dev.jsonl",
         "--train_tasks", "data/dev.jsonl"]


def launch(*arguments, processes=1):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes),
               "train.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def same_numbers(a, b):
    timing = ("rollout_s", "train_s", "tokens_per_s", "idle_share")
    return [{k: v for k, v in m.items() if k not in timing} for m in a] == [{k: v for k, v in m.items() if k not in timing} for m in b]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = launch(*SMALL, "--steps", 3, "--out", out, "--check_logprobs", "True")
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_a_run_leaves_what_the_readme_promises(whole_run):
    out, printed = whole_run
    assert {p.name for p in out.iterdir()} >= {"config.json", "metrics.jsonl", "curves.png", "trajectories.jsonl", "checkpoint", "state"}
    rows = metrics(out)
    assert [m["step"] for m in rows] == [1, 2, 3]
    for key in ("reward", "pass_rate", "turns", "tokens", "entropy", "kept_negatives", "stale_share", "parked", "idle_share", "rollout_s", "train_s", "tokens_per_s"):
        assert all(key in m for m in rows)
    gaps = [float(line.split()[-1]) for line in printed.splitlines() if "trainer - sampler" in line]
    assert len(gaps) == 3 and max(gaps) < 1e-4
    base, trained = load_file(ROOT / "data/nano/model.safetensors"), load_file(out / "checkpoint/model.safetensors")
    assert any(not torch.equal(base[name], trained[name]) for name in base)


def test_resume_is_bitwise_equal(whole_run, tmp_path):
    out, _ = whole_run
    first = launch(*SMALL, "--steps", 1, "--out", tmp_path / "r")
    assert first.returncode == 0, first.stderr[-2000:]
    (tmp_path / "r/state/step-000009.pt").write_bytes(b"torn by a crash")
    second = launch("--resume", tmp_path / "r", "--steps", 3)
    assert second.returncode == 0 and "damaged" in second.stderr, second.stderr[-2000:]
    assert same_numbers(metrics(out), metrics(tmp_path / "r"))
    a, b = load_file(out / "checkpoint/model.safetensors"), load_file(tmp_path / "r/checkpoint/model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


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


def test_a_stopped_run_says_how_to_go_on(tmp_path):
    command = [sys.executable, "train.py", *SMALL, "--steps", "1000", "--out", str(tmp_path / "s")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not ((tmp_path / "s/metrics.jsonl").exists() and (tmp_path / "s/state").exists()) and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "--resume" in errors and "Traceback" not in errors
    assert list((tmp_path / "s/state").glob("step-*.pt"))


@pytest.mark.parametrize("arguments, words", [
    (["--model", "./nowhere"], "cannot load the model"), (["--train_tasks", "nowhere.jsonl"], "no task file"), (["--resume", "nowhere"], "no run there"),
    (["--temperature", "0"], "--temperature"), (["--reward", "nowhere.py:f"], "--reward"), (["--no_such_flag", "1"], "unknown flag --no_such_flag"), (["--steps", "many"], "--steps")])
def test_bad_input_gives_a_clear_line(arguments, words):
    done = subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and words in done.stderr


def test_the_loop_raises_what_is_rewarded(tmp_path):
    """A reward for giving an answer within two turns makes such trajectories more frequent."""
    (tmp_path / "soon.py").write_text("def soon(trajectory):\n    return float(len(trajectory.turns) <= 2 and trajectory.status == 'answered')\n")
    done = launch("--tasks_per_step", 4, "--samples", 8, "--eval_tasks", 0, "--steps", 9, "--max_turns", 4, "--train_tasks", "data/dev.jsonl",
                  "--reward", f"{tmp_path}/soon.py:soon", "--out", tmp_path / "run", "--learning_rate", "1e-3", "--warmup", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    rewards = [m["reward"] for m in metrics(tmp_path / "run")]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards
