import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# A shell starts what it puts into the background deaf to this signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may try a hub
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as in train.py

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

from context import Chat
from data.task import load_tasks
from data.world import World, write_world
from engine import Engine, load_policy
from rollout import RolloutArgs
from support.toolbox import Toolbox
from tools import signatures


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the long sweeps in full")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: a long test that runs with --full only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="runs with --full"))


@pytest.fixture(scope="session")
def full(request) -> bool:
    """Whether the long sweeps run in full; by default a sample of each runs."""
    return request.config.getoption("--full")


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run a script, or only its `main`, within this process, since importing takes longest."""
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()

    def run(main, *arguments) -> subprocess.CompletedProcess:
        script, code = main if isinstance(main, str) else main.__code__.co_filename, None
        monkeypatch.setattr(sys, "argv", [Path(script).name, *map(str, arguments)])
        capsys.readouterr()  # what was printed before
        AcceleratorState._reset_state()  # it would keep the precision of an earlier run
        try:
            if main is script:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                main()
        except SystemExit as end:
            code = end.code  # a message, or None
        torch.set_num_threads(threads)
        AcceleratorState._reset_state()
        printed, errors = capsys.readouterr()
        return subprocess.CompletedProcess(
            sys.argv, int(code is not None), printed, f"{errors}{code or ''}"
        )

    return run


@pytest.fixture
def quick_start(monkeypatch, full):
    """Rollout workers need not import anything; with --full they do, as in a run."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")  # for the server that forks them
    if not full:
        import forked  # which imports much

        monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: forked)


@pytest.fixture(scope="session")
def tokenizer():
    return load_policy("nano")[1]


@pytest.fixture(scope="session")
def chat(tokenizer):
    return Chat(tokenizer, signatures())


@pytest.fixture(scope="session")
def world_dir(tmp_path_factory):
    """A small world of the dev split, written once."""
    return write_world(World(11, 60, "dev"), tmp_path_factory.mktemp("worlds") / "w11")


@pytest.fixture(scope="session")
def deep_dir(tmp_path_factory):
    """A small deep world of the test split, written once."""
    return write_world(
        World(12, 300, "test", kind="deep"), tmp_path_factory.mktemp("worlds") / "d12"
    )


@pytest.fixture(scope="session")
def toolbox():
    return Toolbox(RolloutArgs())


@pytest.fixture(scope="session")
def dev_tasks():
    return load_tasks(ROOT / "data" / "dev.jsonl")


@pytest.fixture
def tiny(tokenizer):
    """A random two-layer model with the nano tokenizer's vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # far from uniform, so that wrong positions or masks show
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    return model


@pytest.fixture
def make_engine(chat):
    def make(model, args: RolloutArgs):
        return Engine(model, chat, args)

    return make
