"""How a run ends when somebody asks it to: cooperatively.

SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal) only set a flag. The loops look at it at
turn boundaries and between micro-batches (`check`), so nothing is interrupted in the middle. What
does not end within END_S seconds, and what is asked twice, ends at once.

In: signals. Out: `Stopped`, raised by `check`. This file imports nothing that takes time to load,
so a script can listen before it imports anything else.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading

END_S = 8.0  # after a signal the process is gone at the latest so many seconds later
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

received: list[int] = []  # signals, in the order in which they came
losses: list[str] = []  # what else makes an end necessary, in words: a rank that is gone
children: list = []  # Popen objects of other ranks, which get the signals that we get


class Stopped(Exception):
    """The run was asked to end; raised at a place where it is safe to end."""


def listen(script: str) -> None:
    """Take the signals from now on, also in a process that was born deaf to them.

    A thread reads their numbers, so that the second signal and the last resort work even while the
    main thread is inside a call into C.

    Args:
        script: name in the one line that a hard end leaves.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, frame: None)

    def watch() -> None:
        while True:
            number = os.read(reader, 1)[0]
            if number not in SIGNALS:
                continue
            if number in received:  # a launcher may pass on a signal of another kind
                end_now(script, "without saving")
            received.append(number)
            for child in children:
                child.send_signal(number)
            if len(received) == 1:
                end_later(script, "in the middle of something that did not end")

    threading.Thread(target=watch, name="signals", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def end_now(script: str, words: str) -> None:
    """End this process and the other ranks, without anything else."""
    if not is_child():  # rank 0 speaks for all
        sys.stderr.write(f"{script}: stopped, {words}\n")
    for child in children:
        child.kill()
    os._exit(130)


def end_later(script: str, words: str) -> None:
    """The last resort: end in END_S seconds what does not end by itself."""
    timer = threading.Timer(END_S, end_now, [script, words])
    timer.daemon = True
    timer.start()


def lose(script: str, words: str) -> None:
    """Something without which the run cannot go on is gone: end it as if the user had asked."""
    losses.append(words)
    end_later(script, words)


def is_child() -> bool:
    """Whether rank 0 of this machine has started us (`processes.start_ranks`)."""
    return "NANO_PARENT" in os.environ


def check() -> None:
    """Raises Stopped if the user has asked for an end, or the run cannot go on."""
    if received or losses:
        raise Stopped


@contextlib.contextmanager
def deaf():
    """A process that is started in this block is born deaf to the signals. It would not survive
    them while it imports; its parent ends it, or it listens later. Ours wait until the block ends.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """On Linux this process gets a signal when the thread that started it ends. Elsewhere a closed
    pipe must tell it.

    Args:
        parent: process id of the parent, as the parent knows it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it had ended before we could ask for that
        os._exit(1)
