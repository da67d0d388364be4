"""The commands on a machine whose network is cut: a network namespace that has loopback and nothing else."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import evaluate

UNSHARE = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
# A new namespace's loopback is down: switch it on (SIOCSIFFLAGS: up, running), then become the command.
LOOPBACK_UP = """import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 0x41))
assert [name for _, name in socket.if_nameindex() if name == 'lo'] and not open('/proc/net/route').read().splitlines()[1:]
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""

pytestmark = pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="network namespaces are not allowed here",
)


def cut(*command):
    """Run `python COMMAND` without a network."""
    return subprocess.run(
        [*UNSHARE, sys.executable, "-c", LOOPBACK_UP, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def figures(path):
    result = json.loads(path.read_text())
    return {key: value for key, value in result.items() if key != "settings"}


@pytest.mark.full
def test_evaluation_is_unaffected(tmp_path, run_here):
    flags = ["--tasks", "data/dev.jsonl", "--limit", "3", "--samples", "1", "--json"]
    here = run_here(evaluate.main, *flags, tmp_path / "here.json")
    there = cut("evaluate.py", *flags, tmp_path / "cut.json")
    assert here.returncode == there.returncode == 0, there.stderr
    assert (
        figures(tmp_path / "here.json") == figures(tmp_path / "cut.json")
        and here.stdout == there.stdout
    )
    assert "python tool: " in there.stderr


def test_the_commands_need_no_network(tmp_path):
    done = cut("-m", "pytest", "-n", "0", "--basetemp", tmp_path / "t", "tests/network_cut.py")
    assert done.returncode == 0, done.stdout
