"""How a program ends: exit codes, errors in one sentence, signals, and output that cannot be written."""

import contextlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from data import InputError
from search.settings import print_error

LAST_SECONDS = 12  # maximum time to stop after a signal


def run_program(name: str, work: Callable[[], int]) -> int:
    """Run a program's work, and return its exit code.

    Returns:
        What work returns; 2 for bad input, 1 if the disk is full or Ray died, each after one sentence on stderr;
        128 + n if signal n interrupted it, so 130 for Ctrl-C.
    """
    with safe_output(), interruptible() as signals:
        try:
            return work()
        except SystemExit as end:  # argparse has printed why
            return int(end.code or 0)
        except (InputError, OSError) as error:
            print_error(error, name)
            return 2 if isinstance(error, InputError) else 1
        except KeyboardInterrupt:
            return 128 + signals[0]


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt in the main thread at the first signal, and ignore later ones; yield those received.

    Signals that were ignored before, as under nohup, stay ignored. If the block is still running LAST_SECONDS after a
    signal, for example because it waits for processes that got it too, this process exits.
    """
    received, to_watch, ended = [], queue.SimpleQueue(), threading.Event()

    def interrupt(number: int, frame: object) -> None:
        if not received:
            received.append(number)
            to_watch.put(number)
            raise KeyboardInterrupt

    def watch() -> None:
        number = to_watch.get()
        if not ended.wait(LAST_SECONDS):
            os._exit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, interrupt)
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
        function: has a few seconds to return once interrupted is set, and is then abandoned.
        interrupted: set on KeyboardInterrupt, which is then raised.

    Raises:
        BaseException: what the function raises.
    """
    outcome = queue.SimpleQueue()

    def run() -> None:
        try:
            function()
            outcome.put(None)
        except BaseException as error:
            outcome.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:  # a signal does not wake a thread that waits without a timeout
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


class SafeStream:
    """A text stream that replaces what it cannot encode with "?" and drops what it cannot write."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, closed, or on a full disk
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self.stream.flush()

    def isatty(self) -> bool:
        return bool(self.stream) and not self.stream.closed and self.stream.isatty()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Ignore failures of stdout and stderr, in the block and when Python exits."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(SafeStream, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in filter(None, streams):  # None: closed before Python started
            try:
                stream.flush()
            except (OSError, ValueError):
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
