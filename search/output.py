"""What is printed may go nowhere: that must never cost a search."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class Output:
    """A text stream that prints as "?" what it cannot encode, and drops what nobody can read any more."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # a pipe, a terminal or the file itself is closed; a full disk
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextlib.contextmanager
def printing_safely() -> Iterator[None]:
    """Let no failure of stdout or stderr reach what prints within, nor Python as it exits."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Output, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            try:
                stream.flush()
            except (OSError, ValueError):
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
