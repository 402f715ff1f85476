"""What Ctrl-C, SIGTERM, a closed terminal and a batch system's warning do: README's table has it in words."""

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LAST_SECONDS = 12  # for what is to be done after a signal


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[list[int]]:
    """Have the first signal raise KeyboardInterrupt in the main thread, and ignore later ones; yields what came.

    Signals already ignored, as under nohup, stay ignored. If the block is still running LAST_SECONDS after a signal,
    for example because it waits for processes that got it too, this process exits.
    """
    received, to_watch, ended = [], queue.SimpleQueue(), threading.Event()

    def interrupt(number: int, frame: object) -> None:
        if not received:  # others may come with it, or be sent by someone impatient
            received.append(number)
            to_watch.put(number)
            raise KeyboardInterrupt

    def watch() -> None:
        number = to_watch.get()
        if not ended.wait(LAST_SECONDS):
            os._exit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, interrupt)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ended.set()
        to_watch.put(0)


def run_in_thread(function: Callable[[], object], interrupted: threading.Event) -> None:
    """Run a function in a thread, so that this one can handle signals.

    Args:
        function: has a few seconds to end once interrupted is set, then it is abandoned.
        interrupted: is set on KeyboardInterrupt, which is then raised.

    Raises:
        BaseException: what the function raises.
    """
    outcome = queue.SimpleQueue()

    def run() -> None:
        try:
            function()
        except BaseException as error:
            outcome.put(error)
        else:
            outcome.put(None)

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:  # a signal that another thread gets does not wake this one
            with contextlib.suppress(queue.Empty):
                error = outcome.get(timeout=0.5)
                break
        if error is not None:
            # If a whole job is signalled, Ray's processes may end before this one gets the signal.
            threading.Event().wait(1)
            raise error
    except KeyboardInterrupt:
        interrupted.set()
        with contextlib.suppress(queue.Empty):
            outcome.get(timeout=LAST_SECONDS / 3)
        raise
