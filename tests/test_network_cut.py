"""The commands on a machine whose network is cut: a network namespace that has loopback and nothing else."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

UNSHARE = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
# A new namespace's loopback is down: switch it on (SIOCSIFFLAGS: up, running), then become the command.
LOOPBACK_UP = """import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 0x41))
assert [name for _, name in socket.if_nameindex() if name == 'lo'] and not open('/proc/net/route').read().splitlines()[1:]
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""
KEYS = {"BRAVE_API_KEY": "brave", "SERPER_API_KEY": "serper", "TAVILY_API_KEY": "tavily"}

pytestmark = pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="network namespaces are not allowed here",
)


def cut(*command, environment=None):
    """Run `python COMMAND` without a network; keys of search services only as given."""
    clean = {name: value for name, value in os.environ.items() if name not in KEYS} | (
        environment or {}
    )
    return subprocess.run(
        [*UNSHARE, sys.executable, "-c", LOOPBACK_UP, *map(str, command)],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
    )


def figures(path):
    result = json.loads(path.read_text())
    return {key: value for key, value in result.items() if key != "settings"}


@pytest.mark.full
def test_evaluation_is_unaffected(tmp_path):
    flags = ["evaluate.py", "--tasks", "data/dev.jsonl", "--limit", "3", "--samples", "1", "--json"]
    here = subprocess.run(
        [sys.executable, *flags, tmp_path / "here.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    there = cut(*flags, tmp_path / "cut.json")
    assert here.returncode == there.returncode == 0, there.stderr
    assert (
        figures(tmp_path / "here.json") == figures(tmp_path / "cut.json")
        and here.stdout == there.stdout
    )
    assert "python tool: " in there.stderr


def test_training_is_unaffected(tmp_path):
    flags = (
        "--processes 1 --threads 1 --tasks_per_step 2 --samples 4 --eval_tasks 0 --max_turns 4"
        " --steps 1 --train_tasks data/dev.jsonl --dev_tasks data/dev.jsonl"
    )
    done = cut("train.py", *flags.split(), "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert (
        row["step"] == 1
        and row["turns"] > 1
        and "tool_fault" not in row["status"]
        and done.stdout.count("python tool: ") == 1
    )


@pytest.mark.parametrize(
    "script, provider, environment, words",
    [
        (
            "train.py",
            "serper",
            {"SERPER_API_KEY": "k-secret"},
            "search by serper: cannot reach google.serper.dev",
        ),
        (
            "evaluate.py",
            "tavily",
            {},
            "search by tavily needs an API key in the environment variable TAVILY_API_KEY",
        ),
    ],
)
def test_a_live_provider_fails_with_one_line(tmp_path, script, provider, environment, words):
    out = ["--out", tmp_path / "run"] if script == "train.py" else []
    done = cut(script, "--search", provider, *out, environment=environment)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert (
        done.returncode == 1
        and len(lines) == 1
        and lines[0].startswith(f"{script}: {words}")
        and "k-secret" not in done.stdout + done.stderr
    )


def test_every_provider_names_its_key_or_its_host():
    code = """import os
from support.search_services import SERVICES
from rollout import RolloutArgs
from support.toolbox import Toolbox
for key in ("", "k-secret"):
    for name, provider in SERVICES.items():
        if provider.key_name:
            os.environ[provider.key_name] = key
        try:
            Toolbox(RolloutArgs(search=name, search_url="" if provider.url else "http://searx.test"))
        except ValueError as error:
            print(name, error)"""
    lines = cut("-c", code).stdout.splitlines()
    assert len(lines) == 8 and "k-secret" not in "".join(lines)
    for name, (without, line) in zip(
        ("searxng", "brave", "serper", "tavily"), zip(lines[:4], lines[4:])
    ):
        assert without.startswith(f"{name} search by {name}") and line.startswith(
            f"{name} search by {name}: cannot reach "
        )
        assert f"{name.upper()}_API_KEY" in without or name == "searxng"
