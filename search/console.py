"""How a program ends: exit codes, errors in one sentence, signals, and output that cannot be written."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

from data import InputError
from search.settings import print_error

LAST_SECONDS = 12  # maximum time to stop after a signal


def run_program(name: str, work: Callable[[], int]) -> int:
    """Run a program's work, and return its exit code.

    It is what work returns; 2 for bad input, 1 if a file cannot be written, memory or the GPU failed or Ray died, each
    after one sentence on stderr; 128 + n if signal n interrupted it, so 130 for Ctrl-C.
    """
    out, err, hook = SafeStream(sys.stdout), SafeStream(sys.stderr), threading.excepthook
    # Ignore an OSError in TensorBoard's threads: the main thread raises it again.
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else hook(args)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), interruptible() as signals:
        try:
            return work()
        except SystemExit as end:  # argparse has printed why
            return int(end.code or 0)
        except (InputError, OSError) as error:
            print_error(error, name)
            return 2 if isinstance(error, InputError) else 1
        except RuntimeError as error:
            reason = str(error).splitlines()[0].rstrip(".")
            if "CUDA" in reason or "cuDNN" in reason:
                print_error(f"the GPU failed ({reason}); use --device cpu, or --gpus-per-trial 0 in a search", name)
            elif "can't allocate memory" in reason:
                print_error(f"out of memory ({reason}); use smaller widths, or fewer images", name)
            else:
                raise
            return 1
        except KeyboardInterrupt:
            return 128 + signals[0]
        finally:
            threading.excepthook = hook
            out.discard_rest()
            err.discard_rest()


@contextlib.contextmanager
def carry_on(failures: list[Exception]) -> Iterator[None]:
    """Report an exception in the block in one sentence and append it to `failures` instead of raising it."""
    try:
        yield
    except Exception as error:
        failures.append(error)
        expected = isinstance(error, (InputError, OSError))
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        print_error(text.splitlines()[0].rstrip("."))


class SafeStream:
    """A text stream that replaces what it cannot encode with "?", and ignores that it cannot write."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream or open(os.devnull, "w")  # noqa: PTH123, SIM115 (None: closed before Python started)
        with contextlib.suppress(AttributeError):  # a StringIO
            self.stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # the disk is full; a pipe or terminal is closed
            self.stream.write(text)
        self.flush()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def discard_rest(self) -> None:
        """Discard what could not be written, at which Python would fail as it exits."""
        try:
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt in the main thread at the first signal, and ignore later ones; yield those received.

    Signals that were ignored before, as under nohup, stay ignored. If the block is still running LAST_SECONDS later,
    for example because it waits for processes that got the signal too, an alarm ends this process.
    """
    received, before = [], {}

    def interrupt(number: int, frame: object) -> None:
        if not received:
            received.append(number)
            signal.alarm(LAST_SECONDS)
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.alarm(0)


def run_in_thread(function: Callable[[], object], interrupted: threading.Event) -> None:
    """Run a function in a thread, so that this one can handle signals, and raise what it raises.

    On KeyboardInterrupt, which is raised again, `interrupted` tells it to return within a few seconds; then it is
    abandoned.
    """
    done = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while not wait([done], timeout=0.5).done:  # a signal does not wake a thread that waits without a timeout
            pass
        if done.exception():
            # If a whole job is signalled, Ray's processes may end before this one gets the signal.
            threading.Event().wait(1)
        done.result()
    except KeyboardInterrupt:
        interrupted.set()
        wait([done], timeout=LAST_SECONDS / 3)
        raise
