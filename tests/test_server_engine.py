"""--engine URL: rollouts on a server that answers in vLLM's or SGLang's dialect (stub_server.py)."""

import copy
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import pytest
import requests
import torch
from conftest import ROOT
from safetensors.torch import load_file
from scripted import ScriptedLoop, scripted_tasks, trainer_gap
from stub_server import Stub, serve
from test_workers import assert_each_exactly_once
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import server_engine
from engine import load_policy
from rollout import RolloutArgs, SyncRollouts, new_group, play
from server_engine import EngineError, ServerEngine, open_engine
from support.checks import check_args, check_rollout_args
from support.run_folder import load_state, read_lines, save
from support.shards import load_moments
from train import Policy, TrainArgs
from workers import AsyncArgs, AsyncRollouts, Setup, WorkerError

SETTINGS = dict(slots=16, max_new_tokens=4, max_context=2000, max_turns=99, tool_steps=1)


@pytest.fixture(scope="module")
def stubs():
    """A server of each dialect, in threads of this process."""
    stubs = {dialect: Stub(dialect) for dialect in ("vllm", "sglang")}
    for stub in stubs.values():
        threading.Thread(target=stub.http.serve_forever, args=(0.02,), daemon=True).start()
    yield stubs
    for stub in stubs.values():
        stub.http.shutdown()


@pytest.fixture(params=["vllm", "sglang"])
def stub(stubs, request):
    stub = stubs[request.param]
    stub.fault, stub.loads = "", 0
    return stub


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    monkeypatch.setattr(server_engine, "PAUSE_S", 0.02)


@pytest.fixture
def nano():
    return load_policy("nano")[0]


@pytest.fixture
def args_of(tmp_path):
    def make(url, **more):
        folder = {"engine_weights": str(tmp_path / "weights")}
        return RolloutArgs(engine=url, **SETTINGS | folder | more)

    return make


def change(model, number: int, by: float = 0.02) -> None:
    """Another version of the weights."""
    torch.manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * parameter.std() * torch.randn_like(parameter))


def served(engine) -> str:
    return engine.server.loaded()


# ------------------------------------------------------------------------------------------ modes


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sync_rollouts_on_a_server_are_those_of_the_learners_weights(
    stub, nano, chat, args_of, temperature
):
    args = args_of(stub.url, temperature=temperature)
    tasks = scripted_tasks(12, 2, turns=lambda rng: int(rng.integers(1, 5)), latency_s=0.0)
    loop = ScriptedLoop(open_engine(nano, chat, args), chat, None, args, lockstep=True)
    next_group = lambda n, version: new_group(tasks[n], n, 2, 0, version)
    rollouts, steps = SyncRollouts(loop, next_group, enough=4, next_number=0), []
    for version in range(3):
        steps.append(rollouts.collect(version))
        trajectories = [t for group in steps[-1] for t in group.trajectories]
        assert trainer_gap(Policy(nano, temperature), trajectories, version) < 1e-4
        assert {turn.version for t in trajectories for turn in t.turns} == {version}
        change(nano, version)
        rollouts.publish(nano, version + 1)
        folder = Path(args.engine_weights) / f"version-{version + 1:06d}"
        assert served(loop.engine).startswith(f"{folder}#")
        assert list(folder.parent.glob("version-*")) == [folder]  # the others are gone
    assert_each_exactly_once(steps, tasks, 2)
    with pytest.raises(ValueError, match="another run"):
        ServerEngine(nano, chat, args)


def test_a_turn_is_the_same_again_and_ends_as_in_our_own_engine(stub, nano, chat, args_of):
    args = args_of(stub.url, max_new_tokens=96)
    engine = open_engine(nano, chat, args)
    prompt = chat.head("Who wrote the book?")
    turns = [engine.turn(prompt, seed) for seed in (1, 1, 2, 3, 4)]
    assert turns[0][:2] == turns[1][:2] and turns[0][0] != turns[2][0]
    ends = {ids[-1] == chat.end_id for ids, _, _ in turns}
    assert True in ends and all(chat.end_id not in ids[:-1] for ids, _, _ in turns)


@pytest.mark.parametrize(
    "dialect, flags",
    [
        ("vllm", dict(partial=True, overlap=True, budget_tokens=60)),
        pytest.param("sglang", dict(partial=True, budget_tokens=60), marks=pytest.mark.full),
        pytest.param("sglang", {}, marks=pytest.mark.full),
    ],
)
def test_workers_on_a_server_have_no_model_and_stay_on_policy(
    stubs, nano, chat, args_of, quick_start, dialect, flags
):
    stub = stubs[dialect]
    stub.fault = ""
    tasks = scripted_tasks(16, 2, turns=lambda rng: int(rng.integers(1, 9)), latency_s=0.005)
    args, gaps, mixed = args_of(stub.url), [], []
    engine = open_engine(nano, chat, args)
    next_group = lambda n, v: new_group(tasks[n], n, 2, 0, v) if n < len(tasks) else None
    setup = Setup("nano", args, loop=ScriptedLoop)
    pool = AsyncRollouts(nano, setup, 1, next_group, 4, AsyncArgs(**flags), engine=engine)
    history, steps = [copy.deepcopy(nano)], []
    try:
        assert pool.weights.flat.numel() == 0  # no copy of the weights
        while groups := pool.collect(len(steps)):
            steps.append(groups)
            trajectories = [t for group in groups for t in group.trajectories]
            for version, model in enumerate(history):
                gaps.append(trainer_gap(Policy(model, 1.0), trajectories, version))
            mixed += [len({turn.version for turn in t.turns}) > 1 for t in trajectories]
            change(nano, len(steps))
            history.append(copy.deepcopy(nano))
            pool.publish(nano, len(steps))
    finally:
        pool.close()
    assert max(gaps) < 1e-4 and any(mixed) == bool(flags)
    assert_each_exactly_once(steps, tasks, 2)


def test_the_trainers_own_engine_forgets_the_old_prefix_in_an_async_run(
    nano, chat, make_engine, tmp_path
):
    """It plays the evaluations between updates."""
    args = RolloutArgs(**SETTINGS)
    engine = make_engine(nano, args)
    pool = AsyncRollouts(nano, Setup("nano", args), 0, None, 1, AsyncArgs(), engine=engine)
    engine.prefix_ready = True
    pool.publish(nano, 1)
    assert engine.version == 1 and not engine.prefix_ready


# -------------------------------------------------------------------------- pushes, and a lost server


def test_a_turn_in_flight_during_a_push_is_repeated_and_never_mixed(stub, nano, chat, args_of):
    engine = open_engine(nano, chat, args_of(stub.url, max_new_tokens=32))
    prompt, turns, stub.fault = chat.head("Who wrote the book?"), [], "frozen"
    threads = [
        threading.Thread(target=lambda seed=seed: turns.append(engine.turn(prompt, seed)))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    while sum(slot is not None for slot in stub.engine.slots) < len(threads):
        time.sleep(0.01)
    change(nano, 1)
    engine.new_weights(1)  # a trainer would have waited
    for thread in threads:
        thread.join()
    assert len(stub.aborted) >= len(threads) and len(turns) == len(threads)
    for ids, logprobs, _ in turns:
        row = torch.tensor([prompt + ids])
        ours = nano(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        ours = ours.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert (ours - torch.tensor(logprobs)).abs().max() < 1e-4


def test_a_server_that_was_restarted_between_two_turns_gets_the_weights_again(
    stub, nano, chat, args_of
):
    change(nano, 5)
    engine = open_engine(nano, chat, args_of(stub.url))
    player = ServerEngine(torch.nn.Module(), chat, args_of(stub.url))  # as in a worker
    before = player.turn([5, 6, 7], 3)
    start = load_policy("nano")[0]
    stub.model.load_state_dict(start.state_dict())  # as after a restart
    stub.engine.new_weights(0)
    stub.version = "default"
    assert player.turn([5, 6, 7], 3)[:2] == before[:2]
    name = served(engine)
    assert engine.turn([5, 6, 7], 3)[:2] == before[:2]  # the other one finds them loaded
    assert served(engine) == name and stub.loads == 2


class StubProcess:
    """A stub as a process of its own, to be killed."""

    def __init__(self, dialect: str):
        with socket.create_server(("127.0.0.1", 0)) as place:
            self.port = place.getsockname()[1]
        self.dialect, self.url = dialect, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = forked.Process(serve, args=(self.dialect, self.port), daemon=True)
        self.process.start()

    def wait(self) -> None:
        while True:
            try:
                return requests.get(f"{self.url}/v1/models", timeout=5).close()
            except requests.ConnectionError:
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def stub_process(quick_start):
    stub = StubProcess("vllm")
    stub.wait()
    yield stub
    stub.kill()


def test_a_server_that_is_killed_in_the_middle_loses_nothing(
    stub_process, nano, chat, args_of, capfd, monkeypatch
):
    change(nano, 3)  # so that its start weights are wrong
    args = args_of(stub_process.url)
    loop = ScriptedLoop(open_engine(nano, chat, args), chat, None, args)
    tasks = scripted_tasks(12, 2, turns=lambda rng: int(rng.integers(2, 6)), latency_s=0.01)
    groups = [new_group(task, n, 2, 0) for n, task in enumerate(tasks)]

    times = []

    def kill():
        while loop.engine.stats["sampled"] < 100:
            time.sleep(0.005)
        times.append(time.perf_counter())
        stub_process.kill()
        stub_process.start()
        stub_process.wait()
        times.append(time.perf_counter())

    thread = threading.Thread(target=kill)
    thread.start()
    trajectories = play(loop, [t for group in groups for t in group.trajectories])
    thread.join()
    assert_each_exactly_once([groups], tasks, 2)
    assert trainer_gap(Policy(nano, 1.0), trajectories) < 1e-4
    turns = [turn for t in trajectories for turn in t.turns]
    spans = [(turn.began, turn.began + turn.generate_s) for turn in turns]
    assert min(spans)[0] < times[0] and times[1] < max(spans)[1]
    assert not any(
        start < times[0] and times[1] < end for start, end in spans
    )  # nobody pays for it
    said = capfd.readouterr().err
    assert said.count("is not ready") == 1 and "waiting for it, at most 600 s" in said

    stub_process.kill()
    monkeypatch.setattr(server_engine, "WAIT_S", 0.1)
    with pytest.raises(WorkerError, match="the engine http.* fails: .*refused"):
        play(loop, new_group(tasks[0], 99, 2, 0).trajectories)


@pytest.mark.full
@pytest.mark.parametrize(
    "mode", [["--rollout=async", "--workers=1", "--partial", "--overlap"], ["--processes=2"]]
)
def test_a_training_run_survives_a_sigkill_of_its_server(stub_process, tmp_path, mode):
    flags = (
        f"--steps=3 --processes=1 --eval_tasks=2 --tasks_per_step=2 --samples=2 --eval_every=1 --max_turns=3 "
        f"--check_logprobs --out={tmp_path / 'run'} --engine={stub_process.url} "
        f"--engine_weights={tmp_path / 'weights'}"
    ).split()
    run = subprocess.Popen(
        [sys.executable, "train.py", *flags, *mode], cwd=ROOT, stdout=-1, stderr=-2, text=True
    )
    while run.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.02)
    stub_process.kill()
    stub_process.start()
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    places = [
        (record["group"], record["index"])
        for record in read_lines(tmp_path / "run" / "trajectories.jsonl")
    ]
    assert len(set(places)) == len(places) and len(places) >= 3 * 4
    assert said.count("log-prob") >= 3 and "disagree" not in said


# ------------------------------------------------------------------------------- a sharded learner


@pytest.fixture
def alone(monkeypatch):
    """A process group of this process alone: tensors are shards there, too."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def learn(model, optimizer) -> None:
    ids = torch.arange(40, 80)[None]
    model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(
        -1, ids[0, 1:, None]
    ).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_sharded_learner_is_gathered_once_a_push_and_saved_whole(
    alone, stubs, nano, chat, args_of, tmp_path, monkeypatch
):
    stub, plain = stubs["vllm"], copy.deepcopy(nano)
    stub.fault, whole, gathers = "", DTensor.full_tensor, []
    monkeypatch.setattr(DTensor, "full_tensor", lambda t: gathers.append(t) or whole(t))
    for part in (*nano.model.layers, nano):
        fully_shard(part)
    tensors = len(list(nano.parameters()))  # embedding and output matrix are one
    engine = open_engine(nano, chat, args_of(stub.url))
    assert len(gathers) == tensors and isinstance(gathers[0], DTensor)
    made = {}
    for name, model in (("sharded", nano), ("plain", plain)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        learn(model, optimizer)
        (tmp_path / name).mkdir()
        made[name] = optimizer
    engine.new_weights(1)
    assert len(gathers) == 2 * tensors
    for ours, theirs in zip(plain.parameters(), stub.model.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-6)

    for name, model in (("sharded", nano), ("plain", plain)):
        save(tmp_path / name, 1, model, made[name], chat.tokenizer, {"rollouts": [None]})
    one, two = (load_file(tmp_path / name / "checkpoint/model.safetensors") for name in made)
    assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k]) for k in one)
    states = {name: load_state(tmp_path / name) for name in made}
    assert states["sharded"]["model"].keys() == states["plain"]["model"].keys()
    for name in made:  # each goes on from the state of the other
        model = nano if name == "sharded" else plain
        other = states["plain" if name == "sharded" else "sharded"]["optimizer"]
        load_moments(optimizer := torch.optim.AdamW(model.parameters()), other)
        assert all(type(s["exp_avg"]) is type(p.data) for p, s in optimizer.state.items())
        learn(model, optimizer)
    for ours, theirs in zip(plain.parameters(), nano.parameters()):
        assert torch.allclose(ours, whole(theirs), atol=1e-5)


@pytest.mark.full
def test_two_ranks_with_half_of_the_learner_each_equal_one_process(stub_process, tmp_path):
    flags = (
        "--tasks_per_step 2 --samples 4 --max_turns 3 --eval_tasks 0 --save_every 1 --warmup 1"
        " --learning_rate 1e-4 --micro_tokens 1500 --seed 3"
    ).split()
    shard = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    ranks = f"-m torch.distributed.run --master_port {port} --nproc_per_node 2 tests/fsdp_on_cpu.py"
    one, two = tmp_path / "one", tmp_path / "two"

    def train(script: str, env: dict, *flags) -> None:
        means = [f"--engine={stub_process.url}", f"--engine_weights={tmp_path / 'weights'}"]
        command = [sys.executable, *script.split(), *flags, "--check_logprobs", *means]
        run = subprocess.run(
            command, cwd=ROOT, env=os.environ | env, stdout=-1, stderr=-2, text=True, timeout=200
        )
        assert run.returncode == 0, run.stdout
        assert "log-prob" in run.stdout

    def compare(steps: int) -> None:
        for a, b in itertools.zip_longest(*(read_lines(f / "metrics.jsonl") for f in (one, two))):
            for key in ("step", "reward", "pass_rate", "turns", "tokens", "kept_negatives"):
                assert a[key] == pytest.approx(b[key]), key
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        states = [load_state(folder) for folder in (one, two)]
        for a, b in zip(*(state["model"].values() for state in states), strict=True):
            assert (a - b).abs().max() < steps * 1e-5
        for a, b in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
            assert (a["exp_avg"] - b["exp_avg"]).abs().max() < 1e-5 and a["step"] == b[
                "step"
            ] == steps

    train("train.py --processes 1", {}, "--steps=1", f"--out={one}", *flags)
    train(ranks, shard, "--steps=1", f"--out={two}", *flags)
    compare(1)
    weights = [load_file(f / "model.safetensors") for f in (ROOT / "data/nano", two / "checkpoint")]
    assert max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0]) > 5e-5
    train("train.py --processes 1", {}, "--steps=2", f"--resume={one}")
    # Rank 0 alone reads the weights now.
    lean = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    train(ranks, shard | lean, "--steps=2", f"--resume={two}")
    compare(2)


def test_a_sharded_learner_without_a_server_is_one_line(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for rollout in ("sync", "async"):
        with pytest.raises(ValueError, match="give --engine URL and --engine_weights DIR"):
            check_args(TrainArgs(rollout=rollout), RolloutArgs(), AsyncArgs())
    server = RolloutArgs(engine="http://127.0.0.1:8000", engine_weights="here")
    with pytest.raises(ValueError, match="--fsdp_version 2"):
        check_args(TrainArgs(), server, AsyncArgs())
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_args(TrainArgs(), server, AsyncArgs())


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "fault, dialect, line",
    [
        ("dev off", "vllm", "VLLM_SERVER_DEV_MODE=1"),
        ("short", "sglang", "--max_context 100 would do"),
        ("tokenizer", "vllm", "another tokenizer"),
        ("tokenizer", "sglang", "another tokenizer"),
        ("no version", "vllm", "did not take .*: it has 'default'"),
        ("raw", "vllm", "processed_logprobs"),
        ("raw", "sglang", "before temperature"),
        ("stale", "vllm", "has version 0, but its log-probs are those of other weights"),
        ("stale", "sglang", "has version 0, but its log-probs are those of other weights"),
    ],
)
def test_a_wrong_server_is_one_line(stubs, nano, chat, args_of, fault, dialect, line):
    stub = stubs[dialect]
    change(nano, len(fault), by=1.0)  # other weights than the last test has left there
    stub.fault = fault
    with pytest.raises(ValueError, match=line) as error:
        open_engine(nano, chat, args_of(stub.url, temperature=0.5, max_new_tokens=24))
    assert isinstance(error.value, EngineError) and "\n" not in str(error.value)
    stub.fault = ""


def test_stale_weights_are_found_after_a_later_push(stub, nano, chat, args_of):
    engine = open_engine(nano, chat, args_of(stub.url, max_new_tokens=24))
    stub.fault = "stale"
    change(nano, 1)
    with pytest.raises(WorkerError, match="has version 1, but its log-probs"):
        engine.new_weights(1)


def test_an_end_that_is_left_out_is_one_line(stubs, nano, chat, args_of):
    stub = stubs["vllm"]
    stub.fault = ""
    engine = open_engine(nano, chat, args_of(stub.url, max_new_tokens=96))
    stub.fault = "no end"
    with pytest.raises(WorkerError, match="leaves the token out"):
        for seed in range(9):
            engine.turn(chat.head("Who?"), seed)


def test_no_server_another_server_and_another_model(stub, nano, tiny, chat, args_of, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as place:
        free = place.getsockname()[1]
    with pytest.raises(ValueError, match="does not answer: .*refused"):
        open_engine(nano, chat, args_of(f"http://127.0.0.1:{free}"))
    with pytest.raises(ValueError, match="give the base URL of a vLLM or SGLang server"):
        open_engine(nano, chat, args_of(f"{stub.url}/v2"))
    with pytest.raises(ValueError, match="the engine .* fails: 500 .*size mismatch"):
        open_engine(tiny, chat, args_of(f"{stub.url}/v1/"))
    nano.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(WorkerError, match="not all finite"):
        open_engine(nano, chat, args_of(stub.url, engine_weights=str(tmp_path / "other")))


def test_the_two_flags_go_together():
    for more in (dict(engine="http://127.0.0.1:8000"), dict(engine_weights="here")):
        with pytest.raises(ValueError, match="go together"):
            check_rollout_args(RolloutArgs(**more))
