"""The sandbox of the `python` tool: attacks as root and as an ordinary user, survivors, many at once, a machine that offers less."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from attacks import ATTACKS

from support import cpython_sandbox as sandbox
from tools import Python, ToolFault

ROOT = os.geteuid() == 0
HERE = Path(__file__).resolve().parent
needs_sandbox = pytest.mark.skipif(bool(sandbox.missing()), reason=sandbox.missing())
NAMESPACES = (
    bool(shutil.which("unshare"))
    and subprocess.run(["unshare", "-r", "true"], capture_output=True).returncode == 0
)
# The rungs of sandbox.py's ladder. A user namespace with one uid in it is what some containers are.
USERS = [
    *(
        [pytest.param("0", id="root"), pytest.param("1500", id="ordinary user")]
        if ROOT
        else [pytest.param("0", id="ordinary user")]
    ),
    pytest.param(
        "alone",
        id="root without another uid",
        marks=pytest.mark.skipif(not NAMESPACES, reason="user namespaces are not allowed here"),
    ),
]


@pytest.fixture(scope="module")
def run_attacks():
    """Results of the attack suite as a user, run once each: name -> [breached, what the policy saw]."""
    results = {}

    def run(uid: str, *flags: str) -> dict:
        if (uid, flags) not in results:
            command = ["unshare", "-r", sys.executable] if uid == "alone" else [sys.executable]
            done = subprocess.run(
                [*command, str(HERE / "attacks.py"), "--uid", uid.replace("alone", "0"), *flags],
                capture_output=True,
                text=True,
                timeout=400,
            )
            assert done.returncode == 0, done.stderr
            results[uid, flags] = json.loads(done.stdout)
        return results[uid, flags]

    return run


@needs_sandbox
@pytest.mark.parametrize("uid", USERS)
@pytest.mark.parametrize(
    "attack", [*ATTACKS, "files outside are unchanged", "no request arrived", "no process is left"]
)
def test_attack(run_attacks, uid, attack):
    breached, text = run_attacks(uid)[attack]
    if (uid, attack) == ("alone", "become root"):
        pytest.skip("uid 0 it is, of a user namespace, without its rights")
    assert not breached, text
    assert re.search(ATTACKS.get(attack, ("", ""))[1], text), text
    assert "[next call" not in text, text  # the session works again afterwards


@needs_sandbox
@pytest.mark.parametrize("uid", USERS)
def test_the_rung_in_force_is_named(run_attacks, uid):
    rung = {"alone": "uid 0 with its rights dropped", "1500": "the caller's uid 1500"}.get(
        uid, "a uid of its own" if ROOT else f"the caller's uid {os.geteuid()}"
    )
    assert re.fullmatch(rf"Landlock ABI \d+ \+ seccomp, {rung}.*", run_attacks(uid)["isolation"][1])


def test_without_the_sandbox_the_attacks_succeed(run_attacks):
    results = run_attacks("1500" if ROOT else "0", "--unsafe")
    breaches = [name for name, (breached, _) in results.items() if breached]
    assert len(breaches) >= 35, breaches
    for name in (
        "fork",
        "kill another process",
        "read a file",
        "delete",
        "loopback",
        "no request arrived",
        "files outside are unchanged",
    ):
        assert name in breaches


def processes() -> dict[int, str]:
    """pid -> command line of the processes that are there, zombies too."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            found |= (
                {int(folder.name): (folder / "cmdline").read_bytes().decode(errors="replace")}
                if folder.name.isdigit()
                else {}
            )
        except OSError:
            pass
    return found


def children_of_ours() -> set[int]:
    return {
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


@needs_sandbox
def test_many_sandboxes_at_once_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    children, descriptors = children_of_ours(), len(os.listdir("/proc/self/fd"))
    sessions = [Python(timeout_s=100) for _ in range(100)]
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(
                lambda n: sessions[n](
                    code=f"import threading, time; open('f', 'w').write('x'); threading.Thread(target=time.sleep, args=(99,)).start(); {n} + 1"
                ),
                range(100),
            )
        )
        assert results == [str(n + 1) for n in range(100)]
        assert len(list(tmp_path.iterdir())) == 100 and len(children_of_ours() - children) == 100
        list(pool.map(Python.close, sessions))
    assert not list(tmp_path.iterdir())
    assert children_of_ours() == children
    assert len(os.listdir("/proc/self/fd")) == descriptors


@needs_sandbox
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
        "import ctypes; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nwhile True: pass",
        "1",
    ],
)
def test_a_killed_owner_takes_its_sandbox_with_it(code, tmp_path):
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; sys.path.insert(0, sys.argv[1]); from tools import Python; p = Python(timeout_s=60)\n"
            "p(code='1'); print(p.process.pid, flush=True); p(code=sys.argv[2]); input()",
            str(HERE.parent),
            code,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    child = int(owner.stdout.readline())
    time.sleep(0.2)
    assert child in processes()
    owner.kill()
    owner.wait()
    for _ in range(100):
        if "sandbox.py" not in processes().get(child, ""):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the sandbox outlived its owner")


@needs_sandbox
def test_a_session_survives_the_thread_that_began_it():
    session = Python(timeout_s=60)
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(session, code="x = 1").result()
        time.sleep(0.1)
        assert session(code="x + 1") == "2"
    finally:
        session.close()


@needs_sandbox
def test_nothing_runs_between_calls():
    session = Python(timeout_s=60)
    try:
        session(
            code="import threading, time\nn = 0\ndef count():\n    global n\n    while True: n += 1; time.sleep(0.001)\nthreading.Thread(target=count, daemon=True).start()"
        )
        before = int(session(code="n"))
        time.sleep(0.5)
        assert int(session(code="n")) - before < 250
    finally:
        session.close()


@pytest.mark.parametrize("name", ["landlock", "seccomp"])
def test_a_machine_that_offers_less_is_refused(monkeypatch, name):
    class Kernel:
        def syscall(self, *_):
            sandbox.ctypes.set_errno(38)
            return -1 if name == "landlock" else 5

        def prctl(self, *_):
            sandbox.ctypes.set_errno(22)
            return -1

    monkeypatch.setattr("sandbox.libc", Kernel)
    assert name in sandbox.missing().lower()
    monkeypatch.setattr("sys.platform", "darwin")
    assert "needs Linux" in sandbox.missing()


@needs_sandbox
def test_a_child_that_cannot_be_confined_runs_nothing(tmp_path, monkeypatch):
    broken = tmp_path / "sandbox.py"
    broken.write_text(
        (HERE.parent / "sandbox.py")
        .read_text()
        .replace("call(446, ruleset, 0)", "call(446, 999, 0)")
    )
    monkeypatch.setattr("tools.SANDBOX", broken)
    with pytest.raises(ToolFault, match="the sandbox cannot be set up.*Landlock"):
        Python()(code="print('ran')")


def verdict(program: bytes, data: bytes) -> int:
    """What a BPF program answers: the kernel's rules for the few instructions that we use."""
    code = list(struct.iter_unpack("<HBBI", program))
    accumulator, at = 0, 0
    while True:
        op, if_true, if_false, value = code[at]
        at += 1
        if op == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif op == 0x54:
            accumulator &= value
        elif op == 0x06:
            return value
        else:
            holds = {
                0x15: accumulator == value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }[op]
            at += if_true if holds else if_false


@pytest.mark.parametrize("machine", list(sandbox.MACHINES))
def test_seccomp_filter(machine):
    arch, column = sandbox.MACHINES[machine]
    program = sandbox.seccomp_filter(machine, pid=1234)
    ask = lambda number, *arguments, arch=arch: verdict(
        program, struct.pack("<IIQ6Q", number, arch, 0, *(arguments + (0,) * (6 - len(arguments))))
    )
    ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    assert len(program) // 8 < 4096 and ask(0, arch=0x40000003) == KILL
    read, openat, mmap, exit_group = ((0, 257, 9, 231), (63, 56, 222, 94))[column]
    assert {ask(n) for n in (read, openat, mmap, exit_group)} == {ALLOW}
    assert {ask(n) for n in (424, 425, 435, 452, 0x40000000, 0x40000001, 2**32 - 1)} == {ENOSYS}
    table = [entry.split() for entry in sandbox.DENIED.split(",")]
    assert all(len(entry) == 3 for entry in table)
    denied = {int(entry[1 + column]) for entry in table if entry[1 + column] != "-"}
    assert {ask(n) for n in denied} == {EPERM}
    clone, kill, tgkill, prlimit, prctl, pair = (
        call[column]
        for call in (
            sandbox.CLONE,
            sandbox.KILL,
            sandbox.TGKILL,
            sandbox.PRLIMIT,
            sandbox.PRCTL,
            sandbox.SOCKETPAIR,
        )
    )
    assert all(
        ask(n) == ALLOW
        for n in range(424)
        if n not in denied | {clone, kill, tgkill, prlimit, prctl, pair}
    )
    assert ask(clone, 0x3D0F00) == ALLOW  # pthread_create's flags
    assert (
        ask(clone, 17) == ask(clone, 0x10000000) == ask(clone, 0x10000 | 0x20000) == EPERM
    )  # fork, namespaces
    for call in (kill, tgkill):
        assert (
            ask(call, 1234, 9) == ALLOW
            and ask(call, 1, 9) == ask(call, 0, 9) == ask(call, 2**64 - 1, 9) == EPERM
        )
    assert ask(prlimit, 0) == ask(prlimit, 1234) == ALLOW and ask(prlimit, 77) == EPERM
    assert (
        ask(prctl, 15) == ALLOW and ask(prctl, 1) == ask(prctl, 4) == EPERM
    )  # a thread's name; PR_SET_PDEATHSIG, PR_SET_DUMPABLE
    assert ask(pair, 1, 1 | 0o2000000) == ALLOW and ask(pair, 1, 2) == EPERM  # stream, datagram


@pytest.mark.skipif(
    not os.path.exists("/usr/include/asm-generic/unistd.h"), reason="no kernel headers here"
)
def test_system_call_numbers_are_the_kernel_s():
    headers = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")
    for column, header in enumerate(headers):
        if os.path.exists(header):
            numbers = {
                name: int(number)
                for name, number in re.findall(
                    r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()
                )
            }
            for name, *ours in (entry.split() for entry in sandbox.DENIED.split(",")):
                if ours[column] != "-":
                    assert numbers[name] == int(ours[column]), name


@needs_sandbox
def test_limits_are_those_of_the_call_not_of_the_session():
    session = Python(timeout_s=60, output_chars=100)
    try:
        for n in range(5):  # output is counted anew for each call
            assert session(code="print('a' * 900_000)").endswith("(900000 characters)")
        assert session(code="open('f', 'w').write('x' * 1000); len(open('f').read())") == "1000"
    finally:
        session.close()


def test_unsafe_is_really_without():
    session = Python(timeout_s=60, unsafe=True)
    try:
        assert session(code="import os; len(open('/etc/passwd').read()) > 0") == "True"
        assert "NANO" not in session(code="os.environ")
    finally:
        session.close()
