import io
import os
import signal
import sys
from pathlib import Path

import pytest

from search.console import run_program
from tests.helpers import disk_full_after


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_first_signal_interrupts_unless_it_was_ignored(name: str) -> None:
    number = signal.Signals[name]

    def work() -> int:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # a second one disturbs nothing
        return 0

    before = signal.getsignal(number)
    try:
        for handler, code in ((signal.SIG_DFL, 128 + number), (signal.SIG_IGN, 0)):  # ignored, as under nohup
            signal.signal(number, handler)
            assert run_program("it", work) == code
            assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


def test_output_that_fails_costs_nothing_and_continues_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> int:
        print("─" * 100_000, "32×32", flush=True)
        with disk_full_after(10):
            print("for which there is no room", flush=True)
        print("room again", file=sys.stderr)
        return sys.stdout.isatty()

    read_end, write_end = os.pipe()
    os.close(read_end)
    closed_pipe, in_ascii = os.fdopen(write_end, "w"), (tmp_path / "ascii").open("w", encoding="ascii")
    full = io.FileIO("/dev/full" if Path("/dev/full").exists() else os.devnull, "w")
    unbuffered = io.TextIOWrapper(full, write_through=True)  # as with PYTHONUNBUFFERED
    for stream in (closed_pipe, unbuffered, in_ascii, None, io.StringIO()):  # None: >&-
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert run_program("it", work) == 0
        if stream:
            stream.flush()  # as Python does when it exits
    assert (tmp_path / "ascii").read_text().endswith("??? 32?32\nroom again\n")
