"""What Ctrl-C, SIGTERM and a closed terminal do."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[list[int]]:
    """On Ctrl-C, SIGTERM or SIGHUP have Ray Tune stop the trials and save the search; yields the signals that came.

    A second signal raises KeyboardInterrupt. Within running_ray only, for Ray sets a handler of its own as it starts.
    """
    received = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGHUP:  # the terminal is gone: what is printed must go elsewhere
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        # SIGUSR1 is what Tune, once it runs, ends on in good order, as it would on SIGINT.
        if len(received) > 1 or not callable(signal.getsignal(signal.SIGUSR1)):
            raise KeyboardInterrupt(number)
        print("\nStopping the trials, in some 10 s; press Ctrl-C again to leave at once.", file=sys.stderr)
        signal.raise_signal(signal.SIGUSR1)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
