"""Work in threads that nobody has to wait for."""

import threading
from concurrent.futures import Future


def in_thread(function, *arguments) -> Future:
    """Run a function in a thread of its own. A thread that hangs keeps neither others nor the end
    of the process waiting.
    """
    future = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="tools", daemon=True).start()
    return future
