"""What confines the `python` tool: attacks on Monty, and on CPython behind Landlock and seccomp.

By default each attack runs on one rung of the CPython ladder; with --full each runs on every rung.
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from attacks import ATTACKS, HELP_MONTY

from support import cpython_sandbox as sandbox
from support import monty_session
from support.cpython_sandbox import CPythonSession
from tools import Python, ToolCall, ToolFault, run_calls

ROOT = os.geteuid() == 0
HERE = Path(__file__).resolve().parent
needs_sandbox = pytest.mark.skipif(bool(sandbox.missing()), reason=sandbox.missing())
NAMESPACES = (
    bool(shutil.which("unshare"))
    and subprocess.run(["unshare", "-r", "true"], capture_output=True).returncode == 0
)
# The rungs of the ladder. A user namespace with one uid in it is what some containers are.
ORDINARY = "1500" if ROOT else "0"
RUNGS = [
    pytest.param(ORDINARY, 0, id="ordinary user"),
    pytest.param("0", 1, id="root", marks=pytest.mark.skipif(not ROOT, reason="we are not root")),
    pytest.param(
        "alone",
        2,
        id="root without another uid",
        marks=pytest.mark.skipif(not NAMESPACES, reason="user namespaces are not allowed here"),
    ),
]


# ------------------------------------------------------------------------------------------- Monty


def monty_child(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def gone(pids: list[int], seconds: float = 10) -> bool:
    """Whether the processes end within so many seconds."""
    end = time.monotonic() + seconds
    while any(map(monty_child, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(monty_child, pids))


def test_attacks_on_monty(tmp_path):
    """The same attacks: none gets anything, and the session then works and has its variables."""
    secret, victims = tmp_path / "secret", tmp_path / "victims"
    secret.write_text("the secret")
    victims.mkdir()
    for name in ("append", "truncate", "delete", "rename", "chmod", "chown", "times", "xattr"):
        (victims / name).write_text("whole")
    decoy = subprocess.Popen(["sleep", "60"])
    names = dict(SECRET=str(secret), INODE=secret.stat().st_ino, VICTIMS=str(victims))
    names |= dict(HOME=os.path.expanduser("~"), PARENT=os.getpid(), DECOY=decoy.pid, PORT=9)
    names |= dict(
        REPOSITORY=str(HERE.parent), UNIX=str(tmp_path / "u"), DATAGRAM=str(tmp_path / "d")
    )
    before = [(p.name, p.stat().st_mode, p.stat().st_mtime_ns) for p in sorted(victims.iterdir())]
    try:
        for name, (code, _) in ATTACKS.items():
            session = Python(timeout_s=0.3)
            session(
                code=HELP_MONTY + "".join(f"{key} = {value!r}\n" for key, value in names.items())
            )
            began = time.monotonic()
            text = session(code=code)
            assert time.monotonic() - began < 3, name
            assert "BREACH" not in text and "the secret" not in text, (name, text)
            assert "variables are lost" not in text, (name, text)
            assert session(code="40 + 2 if DECOY else 0") == "42", name
        assert decoy.poll() is None
    finally:
        decoy.kill()
        decoy.wait()
    after = [(p.name, p.stat().st_mode, p.stat().st_mtime_ns) for p in sorted(victims.iterdir())]
    assert after == before


@pytest.mark.parametrize(
    "code, expected",
    [
        ("while True: pass", "^timeout after 0.5 s; variables are as before the call$"),
        ("print('partial: 17')\nwhile True: pass", "^partial: 17\ntimeout after"),
        ("print('partial', end='')\nwhile True: pass", "^partial\ntimeout after"),
        ("try:\n    while True: pass\nexcept BaseException: pass", "^timeout after"),
        ("import time\nprint('a')\ntime.sleep(100)", "^a\ntimeout after"),
        ("import time\nwhile True: time.sleep(0.1)", "^timeout after"),
        ("import asyncio\nasync def f(): await asyncio.sleep(9)\nasyncio.run(f())", "timeout"),
        ("[0] * 10**9", "^MemoryError: more than 64 MiB; variables are as before the call$"),
        ("x = 'a' * 10**10", "^MemoryError"),
        ("2**(2**40)", "^MemoryError|^OverflowError"),
        ("9**(9**9)", "^MemoryError|^OverflowError|^timeout"),
        ("b = []\nwhile True: b.append('x' * 10**6 + str(len(b)))", "^MemoryError"),
        ("'%1000000000d' % 1", "^MemoryError"),
        ("sorted(range(10**8))", "^MemoryError|^timeout"),
        ("import re\nre.match('(a+)+$', 'a' * 60 + 'b')", "no output"),
        ("def f(): return f()\nf()", "^RecursionError"),
        ("import json\njson.loads('[' * 100000)", "Error"),
        ("y = list(range(10**6))", "variables take more than 4 MiB; variables are as before"),
        ("while True: print('x' * 1000)", "more than 1000000 bytes of output; variables are as"),
        ("print('x' * (20 << 20))", "more than 1000000 bytes of output; variables are as"),
        ("raise ValueError('x' * 10**6)", "^ValueError: x{1000}"),
        ("(" * 50_000, r"\(\(\(.* …$"),
        ("x = '" + "x" * 1_000_000 + "'", "^the code has 1000006 characters, 50000 are allowed"),
        ("-" * 49_000 + "1", "Error"),
        ("x = " + "[" * 150 + "]" * 150, "no output"),
    ],
)
def test_limits_of_monty(code, expected):
    session = Python(timeout_s=0.5, memory_mb=64)
    session(code="kept = 7")
    began = time.monotonic()
    text = session(code=code)
    assert re.search(expected, text) and len(text) < 2200
    assert time.monotonic() - began < 3
    assert session(code="kept") == "7"


def test_no_name_of_the_host_reaches_the_code():
    names = {socket.gethostname(), os.path.expanduser("~"), str(HERE.parent), sys.executable}
    names |= {"pydantic", sys.prefix, os.getcwd(), str(os.getpid()), "NANO"}
    session = Python()
    for code in """import os; os.environ | os.getcwd() | os.listdir('/') | os.uname() | __file__
        import sys; sys.path | sys.argv | sys.executable | sys.modules | sys.version | import socket
        import platform | import getpass | __builtins__ | globals() | locals() | print.__self__
        import pathlib; pathlib.Path.home() | pathlib.Path('.').resolve() | open('/etc/hostname')
        Python | session | class A: pass | A() | A | (lambda: 0) | print | type(print)
        import traceback; traceback.format_stack() | import inspect | import gc | help""".split(
        "|"
    ):
        text = session(code=code.strip().replace("; ", "\n"))
        assert not [name for name in names if name in text], (code, text)


def test_a_snapshot_is_bytes_that_survive_a_checkpoint():
    memory = {}
    Python(memory)(code="x = {'a': [1, 2.5, 'é']}\ndef f(n): return n + 1")
    assert isinstance(memory["python"], bytes) and len(memory["python"]) < 5000
    file = io.BytesIO()
    torch.save({"memory": memory}, file)
    file.seek(0)
    restored = torch.load(file, weights_only=True)["memory"]
    assert restored == memory
    assert Python(restored)(code="f(len(x['a'])), x['a'][2]") == "(4, 'é')"
    assert Python(memory)(code="x['a'][0] += 1\nx['a'][0]") == "2"
    assert Python(restored)(code="x['a'][0]") == "1"  # a copy goes its own way


@pytest.mark.parametrize("damage", ["cut", "forged", "emptied", "flipped", "text", "number"])
def test_a_damaged_snapshot_begins_a_new_session(damage):
    memory = {}
    Python(memory)(code="x = 1\ndef f(n): return n")
    good = memory["python"]
    kinds = {"cut": good[:-20], "forged": os.urandom(500), "emptied": b"", "text": "x", "number": 5}
    memory["python"] = kinds.get(damage, good[:200] + bytes([good[200] ^ 255]) + good[201:])
    text = Python(memory)(code="x")
    lost = "the session cannot be read and begins anew, variables are lost"
    assert text == lost or damage == "emptied" and text.startswith("NameError")
    assert Python(memory)(code="y = 2\ny") == "2"


def busy_worker() -> int:
    """The process of a worker that computes now."""
    for _ in range(200):
        if monty_session.BUSY:
            return next(iter(monty_session.BUSY))
        time.sleep(0.01)
    raise AssertionError("no worker is busy")


@pytest.mark.parametrize(
    "kills, expected", [(1, "^before\n499999500000$"), (2, "interpreter died")]
)
def test_a_worker_that_is_killed_in_mid_call(kills, expected):
    """Once: the call is repeated. Twice: one line. The session goes on either way."""
    session = Python(timeout_s=30)
    session(code="x = 5")
    code = "print('before')\nt = 0\nfor i in range(3_000_000): t += i % 1_000_000\n(t - 0) // 3"
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(session, code=code)
        killed = set()
        while len(killed) < kills:
            pid = busy_worker()
            if pid not in killed:
                time.sleep(0.05)
                os.kill(pid, signal.SIGKILL if kills == 2 else signal.SIGINT)
                killed.add(pid)
            time.sleep(0.01)
        text = result.result(timeout=30)
    assert re.search(expected, text) and text.startswith("before")
    assert session(code="x") == "5"


def test_a_worker_that_is_killed_between_calls():
    session = Python()
    with ThreadPoolExecutor(8) as pool:  # all workers are there
        list(pool.map(lambda n: Python()(code="import time\ntime.sleep(0.1)"), range(8)))
    session(code="x = 5")
    for child in psutil.Process().children():
        if "monty" in child.name():
            child.kill()
    assert session(code="x") == "5"


def test_many_threads_share_a_few_workers():
    sessions = [Python() for _ in range(64)]

    def work(n: int) -> str:
        sessions[n](code=f"x = {n}")
        for _ in range(5):
            sessions[n](code="x += 1")
        return sessions[n](code="x")

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(work, range(64))) == [str(n + 5) for n in range(64)]
    workers = [child for child in psutil.Process().children() if "monty" in child.name()]
    assert 1 <= len(workers) <= min(8, os.cpu_count())


@pytest.mark.parametrize("binary", ["/nonexistent", "/bin/false"])
def test_a_pool_that_cannot_start_is_a_fault(monkeypatch, binary):
    monkeypatch.setattr(monty_session, "POOLS", [])
    monkeypatch.setattr("atexit.register", lambda function: None)
    monkeypatch.setenv("MONTY_BIN", binary)
    with pytest.raises(ToolFault, match="python cannot be started"):
        Python()(code="1")


OWNER = """
import multiprocessing, os, psutil, sys, threading, time
sys.path.insert(0, sys.argv[1])
from tools import Python

def pids(): return [child.pid for child in psutil.Process().children() if "monty" in child.name()]
def spawned(queue): queue.put((Python()(code="x = 6 * 7\\nx"), pids()))

if __name__ == "__main__":
    Python()(code="1")
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=spawned, args=(queue,))
    process.start()
    text, theirs = queue.get()
    process.join()
    assert text == "42" and theirs and not set(theirs) & set(pids()), (text, theirs, pids())
    call = Python(timeout_s=2)
    threading.Thread(target=call, args=("while True: pass",), daemon=True).start()
    time.sleep(0.3)
    print(*theirs, *pids(), flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_owner(tmp_path, number):
    """A spawned process has its own workers; no owner leaves one, idle or busy, however it ends."""
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    command = [sys.executable, str(script), str(HERE.parent), "wait" if number else "end"]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) >= 2
    if number:
        owner.send_signal(number)
    owner.wait(timeout=20)
    assert gone(pids)


# A prelude that takes away what only Linux has, for code of this repository, and refuses Landlock
# and seccomp to everything that runs, as a plain container may.
ELSEWHERE = """
import builtins, ctypes, os, runpy, struct, sys
here, script = sys.argv[1], sys.argv[2]
sys.argv = sys.argv[2:]
libc = ctypes.CDLL(None, use_errno=True)
rules = [(0x20, 0, 0, 0)]  # the number of the call
for number in (444, 445, 446, 317, 272):  # Landlock, seccomp, unshare: EPERM
    rules += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50001)]
rules += [(0x15, 0, 3, 157), (0x20, 0, 0, 16), (0x15, 0, 1, 22), (0x06, 0, 0, 0x50001)]
rules += [(0x06, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("<HBBI", *rule) for rule in rules)
buffer = ctypes.create_string_buffer(code, len(code))
if os.uname().machine == "x86_64":
    libc.prctl(38, 1, 0, 0, 0)
    libc.prctl(22, 2, struct.pack("@HP", len(rules), ctypes.addressof(buffer)), 0, 0)
from support import cpython_sandbox
assert cpython_sandbox.missing() or os.uname().machine != "x86_64"
del sys.modules["support.cpython_sandbox"], cpython_sandbox

def without_proc(function):
    def guarded(path, *args, **kwargs):
        if str(path).startswith("/proc") and sys._getframe(1).f_code.co_filename.startswith(here):
            raise FileNotFoundError(2, "no such folder here", str(path))
        return function(path, *args, **kwargs)
    return guarded

builtins.open, os.open, os.listdir = map(without_proc, (builtins.open, os.open, os.listdir))
del os.sched_getaffinity, os.sched_setaffinity
class Library(ctypes.CDLL):
    def __getattr__(self, name):
        return (lambda *given: -1) if name in ("syscall", "prctl") else super().__getattr__(name)
ctypes.CDLL = Library
sys.modules["support.cpython_sandbox"] = None  # to import it is an error
runpy.run_path(script, run_name="__main__")
"""


def run_elsewhere(script: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(HERE.parent), str(script), *arguments],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_the_default_needs_nothing_that_only_linux_has(tmp_path):
    script = tmp_path / "call.py"
    script.write_text(
        "from rollout import RolloutArgs\nfrom support.toolbox import Toolbox\n"
        "from tools import Python\ntoolbox = Toolbox(RolloutArgs())\n"
        "print(toolbox.isolation())\nprint(Python()(code='6 * 7'))"
    )
    assert run_elsewhere(script).split("\n")[:2] == [
        "Monty, an interpreter without system calls",
        "42",
    ]


def test_an_evaluation_runs_where_landlock_and_seccomp_are_denied():
    flags = ("--tasks", "data/test.jsonl", "--limit", "2", "--samples", "1")
    text = run_elsewhere(HERE.parent / "evaluate.py", *flags)
    assert "pass@1" in text and "Monty" in text


# -------------------------------------------------------------- CPython behind Landlock and seccomp


@pytest.fixture(scope="module")
def run_attacks(full):
    """Results of the attacks on a rung, run once each: name -> [breached, what the policy saw]."""
    results = {}

    def run(uid: str, third: int, *flags: str) -> dict:
        if (uid, flags) not in results:
            command = ["unshare", "-r", sys.executable] if uid == "alone" else [sys.executable]
            command += [str(HERE / "attacks.py"), "--uid", uid.replace("alone", "0"), *flags]
            command += [] if full or "--only" in flags else ["--third", str(third)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=400)
            assert done.returncode == 0, done.stderr
            results[uid, flags] = json.loads(done.stdout)
        return results[uid, flags]

    return run


@needs_sandbox
@pytest.mark.parametrize("uid, third", RUNGS)
def test_attacks(run_attacks, uid, third):
    wrong, results = {}, run_attacks(uid, third)
    assert len(results) > len(ATTACKS) // 3
    for attack, (breached, text) in results.items():
        if (uid, attack) == ("alone", "become root"):
            continue  # uid 0 it is, of a user namespace, without its rights
        expected = ATTACKS.get(attack, ("", ""))[1]
        works_again = "[next call" not in text
        if breached or not re.search(expected, text) or not works_again:
            wrong[attack] = text
    assert not wrong


@needs_sandbox
@pytest.mark.parametrize("uid, third", RUNGS)
def test_the_rung_in_force_is_named(run_attacks, uid, third):
    rung = {"alone": "uid 0 with its rights dropped", "1500": "the caller's uid 1500"}.get(
        uid, "a uid of its own" if ROOT else f"the caller's uid {os.geteuid()}"
    )
    isolation = run_attacks(uid, third)["isolation"][1]
    assert re.fullmatch(rf"Landlock ABI \d+ \+ seccomp, {rung}.*", isolation)


@needs_sandbox
@pytest.mark.parametrize("abi", [1, 2, 5])
def test_attacks_on_older_kernels(run_attacks, abi, full):
    """Where Landlock knows less, seccomp denies it."""
    only = "" if full else "trunc|signal of|signal by|lease|notice|open for nothing"
    results = run_attacks(ORDINARY, 0, "--abi", str(abi), "--only", only)
    assert len(results) > 10 and f"Landlock ABI {abi} " in results["isolation"][1]
    for attack, (breached, text) in results.items():
        assert not breached and re.search(ATTACKS.get(attack, ("", ""))[1], text), (attack, text)


def test_without_the_sandbox_the_attacks_succeed(run_attacks):
    results = run_attacks(ORDINARY, 0, "--unsafe")
    breaches = [name for name, (breached, _) in results.items() if breached]
    assert len(breaches) >= len(results) // 2, breaches
    for name in ("fork", "kill another process", "read a file", "delete", "loopback"):
        assert name in breaches or name not in results
    assert "no request arrived" in breaches or "loopback" not in results
    assert "files outside are unchanged" in breaches


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
    return {child.pid for child in psutil.Process().children()}


@needs_sandbox
def test_many_sandboxes_at_once_leave_nothing(tmp_path, monkeypatch, full):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    children, descriptors = children_of_ours(), len(os.listdir("/proc/self/fd"))
    number = 100 if full else 25
    sessions = [CPythonSession(timeout_s=100) for _ in range(number)]
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(
                lambda n: sessions[n](
                    code="import threading, time; open('f', 'w').write('x')\n"
                    f"threading.Thread(target=time.sleep, args=(99,)).start(); {n} + 1"
                ),
                range(number),
            )
        )
        assert results == [str(n + 1) for n in range(number)]
        assert len(list(tmp_path.iterdir())) == number == len(children_of_ours() - children)
        list(pool.map(CPythonSession.close, sessions))
    assert not list(tmp_path.iterdir())
    assert children_of_ours() <= children
    assert len(os.listdir("/proc/self/fd")) <= descriptors


@needs_sandbox
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "import ctypes; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nwhile True: pass",
        "import ctypes, threading\ndef work():\n    while True: pass\n"
        "threading.Thread(target=work).start(); ctypes.CDLL(None).syscall(60, 0)",
        "1",
    ],
)
def test_a_killed_owner_takes_its_sandbox_with_it(code, tmp_path):
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from support.cpython_sandbox import CPythonSession\np = CPythonSession(timeout_s=60)\n"
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
        states = [path.read_text() for path in Path(f"/proc/{child}").glob("task/*/stat")]
        if all(state.rpartition(")")[2].split()[0] in "ZX" for state in states):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the sandbox outlived its owner")


@needs_sandbox
def test_a_session_survives_the_thread_that_began_it():
    session = CPythonSession(timeout_s=60)
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(session, code="x = 1").result()
        time.sleep(0.1)
        assert session(code="x + 1") == "2"
    finally:
        session.close()


@needs_sandbox
@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)", "1"])
def test_a_session_ends_while_a_given_up_thread_is_in_a_call(code, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    descriptors = len(os.listdir("/proc/self/fd"))
    session, calls = CPythonSession(timeout_s=60), [ToolCall("python", {"code": code})] * 3
    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(run_calls, calls, {"python": session})
        while session.process is None:
            time.sleep(0.01)
        session.close()
        assert results.result()[-1] == (
            "error: python cannot be started (the session was closed)",
            True,
        )
    assert not list(tmp_path.iterdir()) and session.process is None
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_the_folder_of_a_killed_owner_is_removed_by_a_later_run(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = ("nano-python-old", "nano-python-new", "another")
    for name in names:
        (tmp_path / name / "folder").mkdir(parents=True)
        if name != "nano-python-new":
            os.utime(tmp_path / name, (time.time() - 2 * sandbox.KEPT_S,) * 2)
    sandbox.opener(unsafe=True)
    assert {path.name for path in tmp_path.iterdir()} == {"nano-python-new", "another"}


@needs_sandbox
def test_nothing_runs_between_calls():
    session = CPythonSession(timeout_s=60)
    try:
        session(
            code="import threading, time\nn = 0\ndef count():\n    global n\n"
            "    while True: n += 1; time.sleep(0.001)\n"
            "threading.Thread(target=count, daemon=True).start()"
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

    monkeypatch.setattr(sandbox, "libc", Kernel)
    assert name in sandbox.missing().lower()
    monkeypatch.setattr("sys.platform", "darwin")
    assert "needs Linux" in sandbox.missing()


@needs_sandbox
def test_a_child_that_cannot_be_confined_runs_nothing(tmp_path, monkeypatch):
    broken = tmp_path / "sandbox.py"
    whole = Path(sandbox.__file__).read_text()
    broken.write_text(whole.replace("call(446, ruleset, 0)", "call(446, 999, 0)"))
    monkeypatch.setattr(sandbox, "__file__", str(broken))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ToolFault, match="the sandbox cannot be set up.*Landlock"):
        CPythonSession()(code="print('ran')")
    broken.write_text("raise ValueError('no such thing')")
    with pytest.raises(ToolFault, match="python cannot be started"):
        CPythonSession()(code="print('ran')")
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert list(tmp_path.iterdir()) == [broken]


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
    read, mmap, exit_group = ((0, 9, 231), (63, 222, 94))[column]
    assert {ask(n) for n in (read, mmap, exit_group)} == {ALLOW}
    assert {ask(n) for n in (424, 425, 435, 452, 0x40000000, 0x40000001, 2**32 - 1)} == {ENOSYS}
    table = [entry.split() for entry in sandbox.DENIED.split(",")]
    assert all(len(entry) == 3 for entry in table)
    denied = {int(entry[1 + column]) for entry in table if entry[1 + column] != "-"}
    assert {ask(n) for n in denied} == {EPERM}
    by_name = {name: numbers[column] for name, numbers, *_ in sandbox.RULES}
    free = set(range(424)) - denied - set(by_name.values())
    assert {ask(n) for n in free} == {ALLOW}
    clone, kill, tgkill, prlimit, prctl, pair = (
        by_name[name] for name in "clone kill tgkill prlimit64 prctl socketpair".split()
    )
    fcntl, ioctl, openat, mkdirat = (by_name[n] for n in "fcntl ioctl openat mkdirat".split())
    assert ask(clone, 0x3D0F00) == ALLOW  # pthread_create's flags
    # A process, namespaces, a thread with a table of files of its own.
    for flags in (17, 0x10000000, 0x3D0F00 | 0x20000, 0x3D0F00 ^ 0x400):
        assert ask(clone, flags) == EPERM
    for call in (kill, tgkill):
        assert ask(call, 1234, 9) == ALLOW
        assert {ask(call, pid, 9) for pid in (1, 0, 2**64 - 1)} == {EPERM}
    assert ask(prlimit, 0) == ask(prlimit, 1234) == ALLOW and ask(prlimit, 77) == EPERM
    # A thread's name; PR_SET_PDEATHSIG, PR_SET_DUMPABLE.
    assert ask(prctl, 15) == ALLOW and ask(prctl, 1) == ask(prctl, 4) == EPERM
    assert ask(pair, 1, 1 | 0o2000000) == ALLOW and ask(pair, 1, 2) == EPERM  # stream, datagram
    assert ask(pair, 2, 1) == ask(pair, 30, 1) == EPERM
    assert {ask(fcntl, 3, command) for command in (0, 1, 2, 3, 4, 5, 6, 1030)} == {ALLOW}
    assert {ask(fcntl, 3, command) for command in (8, 10, 15, 1024, 1026)} == {EPERM}
    assert (
        ask(ioctl, 3, 0x5401) == ALLOW and ask(ioctl, 3, 0x8901) == ask(ioctl, 3, 0x8902) == EPERM
    )
    harmless = (0, 0o1 | 0o100 | 0o1000, 0o2 | 0o1000, 0o200000 | 0o2000000)
    assert {ask(openat, 3, 0, flags) for flags in harmless} == {ALLOW}
    assert {ask(openat, 3, 0, flags) for flags in (0o20200002, 0o1000, 3, 0o1003)} == {EPERM}
    assert ask(mkdirat, 3, 0, 0o777) == ALLOW and ask(mkdirat, 3, 0, 0o300) == EPERM


@pytest.mark.skipif(
    not os.path.exists("/usr/include/asm-generic/unistd.h"), reason="no kernel headers here"
)
def test_system_call_numbers_are_the_kernel_s():
    headers = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")
    ours = [entry.split() for entry in sandbox.DENIED.split(",")]
    ours += [(name, *numbers) for name, numbers, *_ in sandbox.RULES]
    for column, header in enumerate(headers):
        if os.path.exists(header):
            pattern = r"#define __NR(?:3264)?_(\w+)\s+(\d+)"
            numbers = {
                n: int(number) for n, number in re.findall(pattern, Path(header).read_text())
            }
            for name, *calls in ours:
                if calls[column] not in ("-", None):
                    assert numbers[name] == int(calls[column]), name


@needs_sandbox
def test_the_trajectory_s_code_is_repeated_in_a_new_session(tmp_path):
    memory, copies = {}, []
    first = CPythonSession(memory, timeout_s=60)
    try:
        assert first(code="x = 40\nprint('once')") == "once"
        assert "ZeroDivisionError" in first(code="x += 1\n1 / 0")
        copies.append(CPythonSession(json.loads(json.dumps(memory)), timeout_s=60))
        assert copies[0](code="print(x + 1)") == "42"
        first.timeout_s = 0.3
        assert "variables are lost" in first(code="while True: pass")
        assert "python_code" not in memory
        copies.append(CPythonSession(dict(memory)))
        assert "NameError" in copies[1](code="x")
    finally:
        for session in (first, *copies):
            session.close()


@needs_sandbox
def test_output_before_the_end_is_kept():
    session = CPythonSession(timeout_s=0.5)
    try:
        lost = "the session was restarted, variables are lost"
        text = session(code="print('partial result: 17')\nwhile True: pass")
        assert text == f"partial result: 17\ntimeout after 0.5 s; {lost}"
        session.timeout_s = 60
        text = session(code="import os\nprint('said')\nos._exit(3)")
        assert text == "said\nthe session died and was restarted, variables are lost"
        assert "\0" not in session(code="print('\\0' * 2_000_000)")
    finally:
        session.close()


@needs_sandbox
def test_a_session_is_the_first_to_go_when_memory_runs_out():
    session = CPythonSession(timeout_s=60)
    try:
        session(code="1")
        assert Path(f"/proc/{session.process.pid}/oom_score_adj").read_text().strip() == "1000"
    finally:
        session.close()


@needs_sandbox
def test_limits_are_those_of_the_call_not_of_the_session():
    session = CPythonSession(timeout_s=60, output_chars=100)
    try:
        for _ in range(5):  # output is counted anew for each call
            assert session(code="print('a' * 900_000)").endswith("(900000 characters)")
        assert session(code="open('f', 'w').write('x' * 1000); len(open('f').read())") == "1000"
    finally:
        session.close()


def test_unsafe_is_really_without():
    session = CPythonSession(timeout_s=60, unsafe=True)
    try:
        assert session(code="import os; len(open('/etc/passwd').read()) > 0") == "True"
        assert "NANO" not in session(code="os.environ")
    finally:
        session.close()
