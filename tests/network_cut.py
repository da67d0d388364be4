"""What test_network_cut.py runs where the network is cut."""

import json

import pytest

import evaluate
import train
from rollout import RolloutArgs
from support.search_services import SERVICES
from support.toolbox import Toolbox


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    """Keys of search services are there only as a test gives them."""
    for service in SERVICES.values():
        if service.key_name:
            monkeypatch.delenv(service.key_name, raising=False)


def test_training_is_unaffected(tmp_path, run_here):
    flags = (
        "--processes 1 --threads 1 --tasks_per_step 2 --samples 4 --eval_tasks 0 --max_turns 4"
        " --steps 1 --train_tasks data/dev.jsonl --dev_tasks data/dev.jsonl"
    )
    done = run_here(train.main, *flags.split(), "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["step"] == 1 and row["turns"] > 1 and "tool_fault" not in row["status"]
    assert done.stdout.count("python tool: ") == 1


@pytest.mark.parametrize(
    "main, provider, words",
    [
        (train.main, "serper", ": cannot reach google.serper.dev"),
        (evaluate.main, "tavily", " needs an API key in the environment variable TAVILY_API_KEY"),
    ],
)
def test_a_live_provider_fails_with_one_line(
    tmp_path, run_here, monkeypatch, main, provider, words
):
    monkeypatch.setenv("SERPER_API_KEY", "k-secret")
    out = ["--out", tmp_path / "run"] if main is train.main else []
    done = run_here(main, "--search", provider, *out)
    [line] = [line for line in done.stderr.splitlines() if line.strip()]
    start = f"{main.__module__}.py: search by {provider}{words}"
    assert done.returncode == 1 and line.startswith(start)
    assert "k-secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_every_provider_names_its_key_or_its_host(monkeypatch, name):
    key, url = SERVICES[name].key_name, SERVICES[name].url
    lines = []
    for value in ("", "k-secret"):
        if key:
            monkeypatch.setenv(key, value)
        with pytest.raises(ValueError, match=f"^search by {name}") as error:
            Toolbox(RolloutArgs(search=name, search_url="" if url else "http://searx.test"))
        lines.append(str(error.value))
    assert f"{name.upper()}_API_KEY" in lines[0] or name == "searxng"
    assert lines[1].startswith(f"search by {name}: cannot reach ") and "k-secret" not in str(lines)
