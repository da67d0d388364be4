"""Runs the commands of the README on a small setting: the nano model, the embedded world, real
HTTP, real interpreters. Each run carries a mark, and no process with it may be left behind.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from data.world import World, write_world
from support.metrics import metrics_of
from support.run_folder import load_state, lock
from train import main

SMALL = (
    "--processes 1 --threads 1 --tasks_per_step 2 --samples 2 --max_turns 3 --eval_tasks 0"
    " --save_every 1 --format_penalty 0.25"
    " --train_tasks data/dev.jsonl --dev_tasks data/dev.jsonl"
).split()
ASYNC = "--rollout async --partial --workers 1 --slots 16 --max_age 2".split()
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "1"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]

WORDY = """
from reward import Reward

def wordy(trajectory):
    hundreds = sum(len(turn.action_ids) for turn in trajectory.turns) / 100
    return Reward(hundreds, 0.0, parts={"hundreds": hundreds})
"""


class Train:
    """train.py with these flags, in the background; `end` waits for it.

    Args:
        folder: gets what it prints.
        launcher: python's arguments before the script.
    """

    def __init__(self, folder: Path, *flags, launcher=()):
        self.mark = f"{folder}-{time.monotonic_ns()}"
        command = [sys.executable, *launcher, "train.py", *map(str, flags)]
        self.printed, self.errors = folder / "printed.txt", folder / "errors.txt"
        with open(self.printed, "w") as printed, open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=errors,
                env=os.environ | {"RUN_MARKER": self.mark, "PYTHONFAULTHANDLER": "1"},
                start_new_session=True,  # as a shell gives each command a group of its own
            )

    def processes(self) -> list[psutil.Process]:
        """All processes of the run that live, oldest first."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_ours = process.environ().get("RUN_MARKER") == self.mark
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def wait_for(self, condition, seconds: float = 120) -> None:
        """Until something is so, or the run has ended."""
        deadline = time.monotonic() + seconds
        while not condition() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)

    def end(self, seconds: float = 200) -> tuple[int, str, str]:
        """Wait for the end; should the run hang, each of its processes says where.

        Returns:
            (exit status, what it printed, its errors). No process is left.
        """
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for process in reversed(self.processes()):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGABRT)  # faulthandler writes down all stacks
                    time.sleep(0.5)
        hung = self.process.poll() is None or self.process.returncode == -signal.SIGABRT
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        errors = self.errors.read_text()
        assert not hung, f"train.py hangs: {errors[-20000:]}"
        assert not left, f"left behind: {left}"
        return self.process.wait(), self.printed.read_text(), errors


def train(folder: Path, *flags, launcher=()) -> str:
    """Run train.py to its good end; returns what it printed."""
    status, printed, errors = Train(folder, *flags, launcher=launcher).end()
    assert status == 0, errors[-3000:]
    return printed


def last_words(errors: str) -> str:
    """The one line for the user at the end of a run that failed, behind the progress bars."""
    assert "Traceback" not in errors, errors[-3000:]
    lines = [line for line in errors.replace("\r", "\n").splitlines() if "train.py: " in line]
    assert len(lines) == 1, errors[-3000:]
    return lines[0]


def lines_of(folder: Path, name: str = "metrics") -> list[dict]:
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def untimed(rows: list[dict]) -> list[dict]:
    timings = ("rollout_s", "train_s", "tokens_per_s", "idle_share")
    return [{key: v for key, v in row.items() if key not in timings} for row in rows]


def same_weights(a: Path, b: Path) -> bool:
    """Whether two model folders hold the same bits."""
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """Flags of a reward for words, so that every group teaches something."""
    path = tmp_path_factory.mktemp("reward") / "wordy.py"
    path.write_text(WORDY)
    return ["--reward", f"{path}:wordy"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, wordy):
    """Two updates by README's command: the run's folder, and what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "run").mkdir()  # of a run that was stopped in its first update
    (folder / "run" / "evaluations.jsonl").write_text('{"step": 0, "split": "test"}\n')
    flags = [*SMALL, *wordy, "--steps", 2, "--out", folder / "run", "--check_logprobs", "True"]
    return folder / "run", train(folder, *flags, launcher=ACCELERATE)


def test_a_run_leaves_what_the_readme_promises(whole_run):
    out, printed = whole_run
    names = {"config.json", "metrics.jsonl", "curves.png", "trajectories.jsonl", "report.html"}
    assert {path.name for path in out.iterdir()} >= names | {"checkpoint", "state"}
    rows = lines_of(out)
    assert [row["step"] for row in rows] == [1, 2] and not lines_of(out, "evaluations")
    keys = (
        "reward pass_rate turns tokens entropy kept_negatives stale_share parked idle_share"
        " rollout_s train_s tokens_per_s pass_rate_by_family zero_variance_groups reward_parts"
    )
    assert all(key in row for key in keys.split() for row in rows)
    assert len(printed.split("update 2: Pass@1")) == 2  # a line an update, without a terminal, too
    assert printed.splitlines()[-1].startswith("2 steps are done; the held-out Pass@1 was not")
    assert (out / "wordy.py").read_text() == WORDY
    assert json.loads((out / "config.json").read_text())["packages"]["torch"] == torch.__version__
    gaps = [float(line.split()[-1]) for line in printed.splitlines() if "trainer - sampler" in line]
    assert len(gaps) == 2 and max(gaps) < 1e-4
    assert f"{out}/report.html" in printed
    lines = lines_of(out, "trajectories")  # two attempts at two tasks an update
    places = [(line["step"], line["group"], line["index"]) for line in lines]
    assert len(places) == len(set(places)) == 8
    assert all(turn["version"] == line["step"] - 1 for line in lines for turn in line["turns"])
    assert not same_weights(ROOT / "data/nano", out / "checkpoint")


def test_parts_of_a_reward_of_ones_own_are_logged_and_the_format_penalty_holds(whole_run):
    failures = 0
    for row in lines_of(whole_run[0]):
        parts, status = row["reward_parts"], row["status"]
        failed = sum(status.get(s, 0) for s in ("format_error", "over_turns", "over_context"))
        assert parts.get("format", 0) == pytest.approx(-0.25 * failed / sum(status.values()))
        assert row["reward"] == pytest.approx(parts["hundreds"] + parts.get("format", 0))
        failures += failed
    assert failures


def test_resume_is_bitwise_equal_and_survives_a_damaged_state(whole_run, wordy, tmp_path, run_here):
    whole, out = whole_run[0], tmp_path / "run"
    shutil.copytree(whole, out)
    [newest] = (out / "state").glob("step-000002-*.pt")
    newest.write_bytes(newest.read_bytes()[:1000])
    done = run_here(main, "--resume", out, *wordy)
    assert done.returncode == 0 and "damaged" in done.stderr, done.stderr
    assert untimed(lines_of(whole)) == untimed(lines_of(out))
    assert same_weights(whole / "checkpoint", out / "checkpoint")


def test_a_tracker_writes_into_the_runs_folder(tmp_path, run_here):
    pytest.importorskip("tensorboard", reason="needs pip install tensorboard")
    flags = [*SMALL, "--steps", 1, "--log_with", "tensorboard", "--out", tmp_path / "run"]
    assert run_here(main, *flags).returncode == 0
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_one_of_two_runs_in_a_folder_is_refused_and_warnings_are_single_lines(
    tmp_path, run_here, monkeypatch
):
    out, tries = tmp_path / "run", []
    (tmp_path / "one.jsonl").write_text('{"question": "Who?", "answer": "Ada"}\n')
    flags = [*SMALL, "--max_context", 100, "--samples", 1, "--steps", 2, "--out", out]
    flags += ["--train_tasks", tmp_path / "one.jsonl", "--eval_every", 0]
    flags += ["--corpus", write_world(World(11, 60, "dev"), tmp_path / "w11") / "pages.db"]
    out.mkdir()
    other = lock(out)
    assert "another run is writing into" in last_words(run_here(main, *flags).stderr)
    os.close(other)

    def metrics_meanwhile(*counts) -> dict:
        with pytest.raises(ValueError, match="another run is writing into"):
            lock(out)
        tries.append(out)
        return metrics_of(*counts)

    monkeypatch.setattr("train.metrics_of", metrics_meanwhile)
    done = run_here(main, *flags)
    assert done.returncode == 0 and len(tries) == 2
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["warning"] * 3, lines
    for words in ("--samples 1", "1 training tasks", "--max_context"):
        assert done.stderr.count(words) == 1
    assert [row["step"] for row in lines_of(out)] == [1, 2]
    assert "holds a run" in last_words(run_here(main, *flags).stderr)


def assert_like_the_first_update(out: Path, whole: Path):
    """The same trajectories as one process plays, and but for rounding the same weights."""
    [a], b = lines_of(out), lines_of(whole)[0]
    for key in ("reward", "pass_rate", "turns", "tokens", "kept_negatives", "reward_parts"):
        assert a[key] == pytest.approx(b[key]), key
    said = [
        {
            (line["group"], line["index"]): [turn["text"] for turn in line["turns"]]
            for line in lines_of(folder, "trajectories")
            if line["step"] == 1
        }
        for folder in (out, whole)
    ]
    assert said[0] == said[1] and len(said[0]) >= 4
    [state] = (whole / "state").glob("step-000001-*.pt")
    one = torch.load(state, weights_only=True)["model"]
    base, two = (
        load_file(f / "model.safetensors") for f in (ROOT / "data/nano", out / "checkpoint")
    )
    assert max(float((one[name] - two[name]).abs().max()) for name in two) < 1e-5
    assert max(float((base[name] - two[name]).abs().max()) for name in two) > 1e-5


@pytest.mark.full
def test_torchrun_starts_the_ranks_too(whole_run, wordy, tmp_path):
    flags = [*SMALL, *wordy, "--steps", 1, "--out", tmp_path / "run"]
    train(tmp_path, *flags, launcher=TORCHRUN)
    assert_like_the_first_update(tmp_path / "run", whole_run[0])


@pytest.mark.full
def test_two_machines_of_two_ranks_equal_one_process(wordy, tmp_path, monkeypatch):
    """Both stand on loopback; each has a launcher of its own."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    flags = [*SMALL, *wordy, "--tasks_per_step", 4, "--steps", 1, "--out"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    where = ["--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", port]
    machines = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        launcher = [*TORCHRUN, *where, "--node_rank", str(number)]
        machines.append(Train(tmp_path / str(number), *flags, tmp_path / "two", launcher=launcher))
    for machine in machines:
        status, _, errors = machine.end()
        assert status == 0, errors[-2000:]
    train(tmp_path, *flags, tmp_path / "one")
    assert_like_the_first_update(tmp_path / "two", tmp_path / "one")


def test_the_loop_raises_what_is_rewarded(tmp_path, full, run_here):
    """A reward for giving an answer within two turns makes such trajectories more frequent."""
    (tmp_path / "soon.py").write_text(
        "def soon(trajectory):\n"
        "    return float(len(trajectory.turns) <= 2 and trajectory.status == 'answered')\n"
    )
    flags = ["--tasks_per_step", 4 if full else 2, "--samples", 8, "--steps", 9 if full else 6]
    flags += ["--max_turns", 4 if full else 3, "--learning_rate", "5e-4", "--warmup", 1]
    flags += ["--save_every", 99, "--reward", f"{tmp_path}/soon.py:soon", "--out", tmp_path / "run"]
    assert run_here(main, *SMALL, *flags).returncode == 0
    rewards = [row["reward"] for row in lines_of(tmp_path / "run")]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards


# ---------------------------------------------------------------------------------- bad input

BAD_FLAGS = {
    "--model ./nowhere --processes 1": "cannot load the model",
    "--train_tasks nowhere.jsonl --processes 1": "no task file",
    "--resume nowhere": "no run there",
    "--temperature 0": "--temperature",
    "--reward nowhere.py:f --processes 1": "--reward",
    "--no_such_flag 1": "unknown flag --no_such_flag",
    "--steps many": "--steps",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_input_gives_one_clear_line(flags, run_here):
    line = run_here(main, *flags.split()).stderr
    assert line.startswith("train.py: ") and BAD_FLAGS[flags] in line and "\n" not in line


def test_a_reward_that_fails_is_one_line(tmp_path, run_here):
    (tmp_path / "bad.py").write_text("def bad(trajectory):\n    return 1 / 0\n")
    flags = [*SMALL, "--steps", 1, "--out", tmp_path / "run", "--reward", f"{tmp_path}/bad.py:bad"]
    done = run_here(main, *flags)
    words = last_words(done.stderr)
    assert done.returncode != 0 and "train.py: the reward failed on task" in words
    assert "ZeroDivisionError: division by zero (bad.py:2)" in words


def test_steps_without_a_finite_gradient_change_nothing_and_end_the_run(tmp_path, run_here):
    (tmp_path / "huge.py").write_text(
        "def huge(trajectory):\n    return 1e300 if trajectory.key[3] % 2 else -1e300\n"
    )
    flags = ["--steps", 9, "--samples", 4, "--save_every", 2, "--out", tmp_path / "run"]
    flags += ["--reward", f"{tmp_path}/huge.py:huge"]
    done = run_here(main, *SMALL, *flags)
    assert done.returncode != 0 and done.stdout.count("the step was skipped") == 3
    assert "lower --learning_rate" in last_words(done.stderr)
    assert same_weights(ROOT / "data/nano", tmp_path / "run/checkpoint")


# --------------------------------------------------------------------------- how a run ends


def stop(run: Train, number: int) -> str:
    """Send a signal, as the terminal or a user does; returns the one line that the run leaves."""
    sent = time.monotonic()
    if number == signal.SIGINT:  # the terminal gives it to the whole group
        os.killpg(run.process.pid, number)
    else:
        run.process.send_signal(number)
    status, _, errors = run.end(60)
    seconds = time.monotonic() - sent
    assert status != 0 and seconds < 12, (seconds, errors[-2000:])  # 10 s, and the look around
    return last_words(errors)


SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
MOMENTS = ("as the second process starts", "after an update", "after an asynchronous update")


WAITS = f"""{WORDY}
import pathlib, time
from support import endings

def waits(trajectory):
    while (pathlib.Path(__file__).parent / "run/metrics.jsonl").exists() and not endings.received:
        time.sleep(0.01)  # the second update is not made
    return wordy(trajectory)
"""


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_all_ranks_with_one_line(tmp_path, full, whole_run, wordy, name, moment):
    """The second process is a rank, but for a sample's asynchronous run, where it is a worker. What
    two ranks have saved after an update equals what one process has.
    """
    number = getattr(signal, name)
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("ignored here, as under nohup, and so by what is started here")
    if not full and SIGNALS.index(name) != MOMENTS.index(moment):
        pytest.skip("runs with --full")
    out, is_async = tmp_path / "run", "asynchronous" in moment
    flags = [*SMALL, *wordy, "--steps", 1000, "--out", out, *(ASYNC if is_async else [])]
    flags += ["--processes", 2 if full or not is_async else 1]
    if not is_async:
        (tmp_path / "waits.py").write_text(WAITS)
        flags += ["--save_every", 1000, "--keep_trajectories", 1000]
        flags += ["--reward", f"{tmp_path}/waits.py:waits"]
    run = Train(tmp_path, *flags)
    if "starts" in moment:
        run.wait_for(lambda: len(run.processes()) == 2)
        assert "train.py: stopped" in stop(run, number) and not lines_of(out)
        return
    made = "state/step-*.pt" if is_async else "curves.png"  # the last thing of the first update
    run.wait_for(lambda: list(out.glob(made)))
    words = stop(run, number)
    assert f"train.py: stopped after step {len(lines_of(out))}; go on with: " in words
    assert f"--resume {out}" in words
    # With workers on other ranks, the last checkpoint is what the run goes on from.
    assert load_state(out)["step"] >= len(lines_of(out)) - (full and is_async)
    if not is_async:
        assert_like_the_first_update(out, whole_run[0])


HANGS = """
import pathlib, time

def hangs(trajectory):
    (pathlib.Path(__file__).parent / "hangs").touch()
    time.sleep(600)
"""


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    (tmp_path / "hang.py").write_text(HANGS)
    flags = [*SMALL, "--processes", 2, "--out", tmp_path / "run"]
    run = Train(tmp_path, *flags, "--reward", f"{tmp_path}/hang.py:hangs")
    run.wait_for((tmp_path / "hangs").exists)
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(1)
    assert run.process.poll() is None
    sent = time.monotonic()
    os.killpg(run.process.pid, signal.SIGINT)
    run.process.wait(60)
    assert time.monotonic() - sent < 1
    status, _, errors = run.end()
    assert status != 0 and "train.py: stopped, without saving" in last_words(errors)


DEAF = """
import signal, subprocess, sys
from support import endings
code = "import time; from support import endings; time.sleep(0.2); endings.listen('rank');"
code += "print('ready', flush=True); time.sleep(60)"
with endings.deaf():
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
rank.send_signal(signal.SIGTERM)
rank.stdout.readline()
rank.send_signal(signal.SIGTERM)
print(rank.wait())
"""


def test_a_rank_that_is_born_deaf_hears_what_came_meanwhile():
    """A signal must not end a rank while it imports, and must not be lost."""
    command = [sys.executable, "-c", DEAF]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "130\n" and done.stderr == "rank: stopped, without saving\n"


def rank_of(process: psutil.Process) -> str | None:
    """Of a process that runs train.py itself; None of a rollout worker. The environment is the one
    that the process was born with, and rank 0 made itself one later.
    """
    return process.environ().get("RANK", "0") if "train.py" in process.cmdline() else None


@pytest.mark.parametrize("rank", ["1", "1 as it starts", "1 beside workers", "0 beside workers"])
def test_a_rank_that_is_killed_ends_the_run(tmp_path, full, wordy, rank):
    if rank != "1" and not full:
        pytest.skip("runs with --full")
    out = tmp_path / "run"
    flags = [*SMALL, *wordy, "--processes", 2, "--steps", 1000, "--out", out]
    run = Train(tmp_path, *flags, *(ASYNC if "workers" in rank else []))
    starts = "starts" in rank
    run.wait_for(lambda: len(run.processes()) == 2 if starts else (out / "checkpoint").exists())
    ranks = {}
    for process in run.processes():
        with contextlib.suppress(psutil.Error):
            ranks[rank_of(process)] = process
    ranks[rank[0]].kill()
    killed = time.monotonic()
    status, _, errors = run.end(60)
    assert status != 0 and time.monotonic() - killed < 12, errors[-2000:]
    if rank[0] == "0":
        assert "Traceback" not in errors
        return
    words = last_words(errors)
    assert "train.py: stopped, since process 1 was killed by SIGKILL" in words
    assert starts or f"--resume {out}" in words


def test_an_async_run_goes_on_after_a_kill_with_its_parked_work(tmp_path, run_here, quick_start):
    out = tmp_path / "run"
    flags = [*SMALL, *ASYNC, "--overlap", "--stale", "is", "--steps", 1000, "--out", out]
    first = Train(tmp_path, *flags)

    def has_parked_a_turn() -> bool:
        """Whether the newest checkpoint holds one."""
        [kept] = load_state(out)["rollouts"]  # of the one rank
        return any(t["turns"] for group in kept["groups"] for t in group["trajectories"])

    def has_stopped_where_it_has() -> bool:
        if len(list((out / "state").glob("step-*.pt"))) < 2:
            return False
        first.process.send_signal(signal.SIGSTOP)
        if has_parked_a_turn():
            return True
        first.process.send_signal(signal.SIGCONT)
        return False

    # A checkpoint each step: the kill comes near or in the middle of one.
    first.wait_for(has_stopped_where_it_has)
    first.process.kill()
    _, _, errors = first.end()  # workers do not outlive a trainer that was killed
    assert "Traceback" not in errors
    done = max(int(path.name[5:11]) for path in (out / "state").glob("step-*.pt"))
    assert has_parked_a_turn()
    assert run_here(main, "--resume", out, "--steps", done + 1).returncode == 0
    rows = lines_of(out)
    assert [row["step"] for row in rows] == list(range(1, done + 2))
    for row in rows:
        assert sum(row["staleness"].values()) == pytest.approx(1)
        assert row["stale_share"] == pytest.approx(1 - row["staleness"].get("0", 0))
        assert 0 <= row["idle_share"] <= 1 and 0 <= row["trained_share"] <= 1
        assert row["restarts"] == 0


STOPS_ITSELF = f"""{WORDY}
import os, pathlib, signal, sys
import torch
train, here = sys.modules["__main__"], pathlib.Path(__file__).parent

def stop_once(*arguments, **named):
    if (here / "run/metrics.jsonl").exists() and not (here / "stopped").exists():
        (here / "stopped").touch()  # in the second update
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*arguments, **named)

if not (here / "stopped").exists():
    real, TARGET = TARGET, stop_once
"""


@pytest.mark.parametrize("where", ["train.loss_of", "torch.optim.AdamW.step"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_run_stopped_in_an_update_loses_no_step(
    tmp_path, full, whole_run, run_here, quick_start, mode, where
):
    """Saved is the state before that update, with the groups that it was being made of, or the one
    after it; --resume goes on from there.
    """
    if not full and (mode, where) != ("sync", "train.loss_of"):
        pytest.skip("runs with --full")
    (tmp_path / "stop.py").write_text(STOPS_ITSELF.replace("TARGET", where))
    out = tmp_path / "run"
    flags = [*SMALL, *(ASYNC if mode == "async" else []), "--save_every", 1000, "--steps", 20]
    # A micro-batch a row, so that the first is not the last.
    flags += ["--micro_tokens", 1, "--samples", 3] if where == "train.loss_of" else []
    flags += ["--reward", f"{tmp_path}/stop.py:wordy", "--out", out]
    status, _, errors = Train(tmp_path, *flags).end()
    words = last_words(errors)
    assert (tmp_path / "stopped").exists() and status != 0 and f"--resume {out}" in words
    state = load_state(out)
    assert state["step"] == (1 if where == "train.loss_of" else 2)  # the step itself is ended first
    if mode == "sync" and state["step"] == 2:
        assert same_weights(whole_run[0] / "checkpoint", out / "checkpoint")
        return
    to_go_on = words.split("accelerate launch train.py ")[1].split()
    assert run_here(main, *to_go_on, "--steps", state["step"] + 1).returncode == 0
    if mode == "async":
        [kept] = state["rollouts"]
        whole = {
            group["trajectories"][0]["task"]["id"]
            for group in kept["groups"]
            if all(t["status"] != "running" for t in group["trajectories"])
        }
        lines = lines_of(out, "trajectories")
        trained = {line["id"] for line in lines if line["step"] == state["step"] + 1}
        assert whole <= trained and (whole or state["step"] == 2)
