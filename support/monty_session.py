"""Runs code in Monty, the interpreter behind the `python` tool, and keeps a session as bytes.

Monty (the package `pydantic-monty`) understands a part of Python and has no system calls: no files,
no network, no processes, no environment. It runs in worker processes, so its crash does not reach
us. Between two calls a session is a snapshot in bytes, so any worker of any process can go on with
it. The host parses the code, to name syntax errors in Python's words and to find the last
expression, but only Monty runs it.

In: code and the snapshot before it. Out: what it printed, what went wrong in words, the snapshot
after it. NOT stopped: bugs of Monty itself, because no filter of system calls confines a worker; a
worker that computes when its owner is killed goes on until its time limit; the code sees the clock.
To try an idea, raise a limit or give the code functions of the host (`external_lookup` of
`feed_run`).
"""

import ast
import atexit
import contextlib
import os
import signal
import threading
import traceback
import warnings

import pydantic_monty as monty
from pydantic_monty import MontyError

WORKERS = min(8, os.cpu_count() or 1)  # processes, started when they are needed
MAX_CODE_CHARS = 50_000  # the host parses the code, and holds the interpreter lock meanwhile
MAX_OUTPUT_BYTES = 1_000_000  # of one call; a call that prints more is ended
MAX_SNAPSHOT_BYTES = 4 << 20  # it travels with the trajectory
MAX_DEPTH = 500  # calls of functions within each other
WAIT_S = 600  # for a free worker
WATCHDOG_S = 120  # a worker that is silent for so long is killed; calls have tighter limits
KEPT = "variables are as before the call"
DIED = f"the interpreter died; {KEPT}"
UNREADABLE = "the session cannot be read and begins anew, variables are lost"

LOCK = threading.Lock()
POOLS: list[monty.Monty] = []  # none before the first call, then one
BUSY: set[int] = set()  # process ids of workers that run a call

# Python warns when it parses code such as '\d'. The code is not ours, so the warning helps nobody.
warnings.filterwarnings("ignore", category=SyntaxWarning, module="<unknown>|<code>")


def worker_pool() -> monty.Monty:
    """This process's pool of workers, which ends with the process."""
    with LOCK:
        if not POOLS:
            limits = dict(checkout_timeout=WAIT_S, request_timeout=WATCHDOG_S)
            pool = monty.Monty(max_processes=WORKERS, **limits)
            POOLS.append(pool.__enter__())
            atexit.register(end_workers)
        return POOLS[0]


def end_workers() -> None:
    """End the pool, and with it the workers that are in the middle of a call."""
    POOLS.pop().__exit__(None, None, None)
    for pid in list(BUSY):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            os.kill(pid, signal.SIGTERM)


def show_last_value(code: str) -> str:
    """The code, made to print the value of its last expression as Python's prompt does."""
    code = code.replace("\r\n", "\n").replace("\r", "\n")
    tree = ast.parse(code)
    compile(tree, "<code>", "exec", dont_inherit=True)  # finds a `return` outside a function
    if not tree.body or not isinstance(tree.body[-1], ast.Expr):
        return code
    last = tree.body[-1]
    lines = code.encode().split(b"\n")
    before = lines[: last.lineno - 1] + [lines[last.lineno - 1][: last.col_offset]]
    value = ast.get_source_segment(code, last)
    # A comprehension leaves no name behind and adds little to the snapshot, which holds all code.
    show = f"[print(repr(_)) for _ in [(\n{value}\n)] if _ is not None]"
    return b"\n".join(before).decode() + "\n" + show


def one_error(error: BaseException) -> str:
    """The last line of a traceback: what kind of error it is, and its text."""
    return "".join(traceback.format_exception_only(error)).strip()


def shown(output: str, problem: str, output_chars: int) -> str:
    """What the policy sees: at most `output_chars` characters of output, and what went wrong."""
    output = output.replace("\0", "\ufffd").strip()
    if len(output) > output_chars:
        output = f"{output[:output_chars]} … ({len(output)} characters)"
    if len(problem) > output_chars:
        problem = f"{problem[:output_chars]} …"
    return "\n".join(filter(None, (output, problem))) or "(no output)"


def run_code(
    code: str, snapshot: bytes, timeout_s: float, memory_mb: int
) -> tuple[str, str, bytes]:
    """Run a piece of code in a session.

    Args:
        code: what the policy wrote.
        snapshot: the session as the last call left it; b"" begins a new one.
        timeout_s: limit for computing, and once more for sleeping, in seconds.
        memory_mb: limit for the interpreter's heap, in MiB. A session keeps the limits of its
            first call.

    Returns:
        (output, what went wrong in words or "", snapshot). Nothing that the code does raises.

    Raises:
        OSError, RuntimeError, MontyError: no worker can be started, or none became free.
    """
    if len(code) > MAX_CODE_CHARS:
        return "", f"the code has {len(code)} characters, {MAX_CODE_CHARS} are allowed", snapshot
    try:
        code = show_last_value(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return "", one_error(error), snapshot
    limits = {
        "max_feed_duration_secs": timeout_s,
        "max_total_sleep_secs": timeout_s,
        "max_memory": memory_mb << 20,
        "max_recursion_depth": MAX_DEPTH,
    }
    for _ in range(2):  # a worker that somebody else killed in mid-call costs nothing
        session = check_out(limits)
        pid = session.worker_pid
        BUSY.add(pid)
        try:
            output, problem, after = feed(session, code, snapshot, timeout_s, memory_mb)
        finally:
            BUSY.discard(pid)
            session.__exit__(None, None, None)
        if problem not in (DIED, UNREADABLE):
            break
    return output, problem, after


def check_out(limits: dict) -> monty.MontySession:
    """A worker with an empty session; those that were killed while idle (by Ctrl-C, for one) are
    passed over.
    """
    for dead in range(WORKERS + 1):
        session = worker_pool().checkout(
            limits=limits,
            assert_message_annotations=False,  # as Python words it
            os_policy={"random_start": {"seed": 0}},  # a run can be repeated bit for bit
        )
        try:
            return session.__enter__()
        except monty.MontyCrashedError:
            if dead == WORKERS:
                raise


def feed(
    session: monty.MontySession, code: str, snapshot: bytes, timeout_s: float, memory_mb: int
) -> tuple[str, str, bytes]:
    """Load the snapshot in a worker, run the code, take a new one. Returns as `run_code` does."""
    try:
        if snapshot:
            session.load_session(snapshot)
    except (MontyError, TypeError):
        return "", UNREADABLE, b""
    printed = monty.CollectString(max_bytes=MAX_OUTPUT_BYTES)
    problem = ""
    try:
        session.feed_run(code, print_callback=printed)
    except monty.MontyCrashedError as error:
        problem = f"timeout after {timeout_s:g} s; {KEPT}" if error.timed_out else DIED
    except MontyError as error:
        text = str(error)
        if text.startswith(("TimeoutError: feed time limit", "TimeoutError: sleep limit")):
            problem = f"timeout after {timeout_s:g} s; {KEPT}"
        elif f"> {MAX_OUTPUT_BYTES} bytes" in text:
            problem = f"more than {MAX_OUTPUT_BYTES} bytes of output; {KEPT}"
        elif "memory limit" in text:
            problem = f"MemoryError: more than {memory_mb} MiB; {KEPT}"
        else:
            problem = one_error(error.exception())
    if KEPT in problem:
        return printed.output, problem, snapshot
    try:
        after = session.dump()
    except (MontyError, RuntimeError):  # the worker lacks the memory for a copy
        after = None
    if after is None or len(after) > MAX_SNAPSHOT_BYTES:
        problem = f"the variables take more than {MAX_SNAPSHOT_BYTES >> 20} MiB; {KEPT}"
        return printed.output, problem, snapshot
    return printed.output, problem, after
