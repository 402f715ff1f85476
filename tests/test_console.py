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

    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert run_program("it", work) == 128 + number
        signal.signal(number, signal.SIG_IGN)  # as under nohup
        assert run_program("it", work) == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_output_that_fails_costs_nothing_and_continues_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def print_much() -> int:
        print("─" * 100_000, "32×32", flush=True)
        print("to stderr", file=sys.stderr)
        return sys.stdout.isatty()

    def print_to_a_full_disk() -> None:
        with disk_full_after(10):
            print("a long line", flush=True)
        print("room again")

    read_end, write_end = os.pipe()
    os.close(read_end)
    closed_pipe, in_ascii = os.fdopen(write_end, "w"), (tmp_path / "ascii").open("w", encoding="ascii")
    full = io.FileIO("/dev/full" if Path("/dev/full").exists() else os.devnull, "w")
    unbuffered = io.TextIOWrapper(full, write_through=True)  # as with PYTHONUNBUFFERED
    for stream in (closed_pipe, unbuffered, in_ascii, None, io.StringIO()):  # None: >&-
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert run_program("it", print_much) == 0
        if stream:
            stream.flush()  # as Python does when it exits
    assert (tmp_path / "ascii").read_text().endswith("??? 32?32\nto stderr\n")
    with (tmp_path / "log").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run_program("it", print_to_a_full_disk) is None
    assert (tmp_path / "log").read_text().endswith("room again\n")
