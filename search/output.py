"""Output that cannot be written must never stop a search."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class Output:
    """A text stream that replaces what it cannot encode with "?" and drops what it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it flushes what is buffered
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # a pipe, a terminal or the file itself is closed; a full disk
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def isatty(self) -> bool:
        return not self.stream.closed and self.stream.isatty()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextlib.contextmanager
def printing_safely() -> Iterator[None]:
    """Suppress errors of stdout and stderr within the block, and as Python exits."""
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
