"""How a program ends: exit codes, errors in one sentence, signals, and output that cannot be written."""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

from search.settings import PROGRAM

LAST_SECONDS = 12  # maximum time to stop after a signal


def print_error(message: object, program: str = PROGRAM) -> None:
    """Print a sentence on stderr."""
    print(f"{program}: {message}.", file=sys.stderr)


def run_program(name: str, work: Callable[[], int]) -> int:
    """Run a program's work, and return its exit code.

    It is what work returns; 2 for bad input, 1 if a file cannot be written, memory or the GPU failed or Ray died, each
    after one sentence on stderr; 128 + n if signal n interrupted it, so 130 for Ctrl-C.
    """
    out, err, hook = forgiving(sys.stdout), forgiving(sys.stderr), threading.excepthook

    def report(args: threading.ExceptHookArgs) -> None:
        # The main thread raises an OSError of TensorBoard's threads again, and notices when Ray has died.
        if not (isinstance(args.exc_value, OSError) or str(args.thread.name).startswith("ray_")):
            hook(args)

    threading.excepthook = report
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), interruptible() as signals:
        try:
            return work()
        except SystemExit as end:  # argparse has printed why
            return int(end.code or 0)
        except (ValueError, OSError) as error:
            if not (isinstance(error, OSError) or is_input_error(error)):
                raise
            print_error(error, name)
            return 2 if is_input_error(error) else 1
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


def is_input_error(error: Exception) -> bool:
    """Return whether an exception is an InputError, whose module imports torch."""
    from data import InputError

    return isinstance(error, InputError)


@contextlib.contextmanager
def carry_on(failures: list[Exception]) -> Iterator[None]:
    """Report an exception in the block in one sentence and append it to `failures` instead of raising it."""
    try:
        yield
    except Exception as error:
        failures.append(error)
        expected = is_input_error(error) or isinstance(error, OSError)
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        print_error(text.splitlines()[0].rstrip("."))


class ForgivingFile(io.FileIO):
    """A file that discards what cannot be written: the disk is full, or a pipe or terminal is closed."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def forgiving(stream: Any) -> Any:
    """Return a text stream to the same file that never fails, and replaces what it cannot encode with "?"."""
    if stream is None:  # closed before Python started
        return open(os.devnull, "w")  # noqa: PTH123
    if not isinstance(getattr(stream, "buffer", None), io.BufferedWriter | io.FileIO):
        return stream  # a notebook's, or in memory
    with contextlib.suppress(OSError):
        stream.flush()
    file = io.BufferedWriter(ForgivingFile(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding, "replace", line_buffering=True)


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


def start_thread(function: Callable[[], object]) -> Future:
    """Run a function in a thread, which does not keep the program from ending; return its future result."""
    done = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def result_of(done: Future) -> Any:
    """Wait for a result, and return it; signals are handled meanwhile."""
    while not wait([done], timeout=0.1).done:  # a signal does not wake a thread that waits without a timeout
        pass
    return done.result()


def run_in_thread(function: Callable[[], object], interrupted: threading.Event) -> None:
    """Run a function in a thread, so that this one can handle signals, and raise what it raises.

    On KeyboardInterrupt, which is raised again, `interrupted` tells it to return within a few seconds; then it is
    abandoned.
    """
    done = start_thread(function)
    try:
        with contextlib.suppress(Exception):
            result_of(done)
        if done.exception():
            time.sleep(1)  # if a whole job is signalled, Ray's processes may end before this one gets the signal
        done.result()
    except KeyboardInterrupt:
        interrupted.set()
        wait([done], timeout=LAST_SECONDS / 3)
        raise
