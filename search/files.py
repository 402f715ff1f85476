"""How a search's files survive a kill, a full disk and a power cut.

A file or folder is written under a temporary name, flushed to disk and then renamed, so it is never incomplete. A
log only grows, and an incomplete last line is dropped. JSON carries a checksum and torch's archives have their own, so
damage is noticed.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which then replaces target; raise OSError, naming it, on failure."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for path in [*temporary.glob("*"), temporary]:
            flush(path)
        if temporary.is_dir():
            remove(target)  # a folder cannot replace another one
        temporary.replace(target)
        flush(target.parent)
    except (OSError, RuntimeError) as error:  # torch.save raises either
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"cannot write {target} ({reason}); make room there") from error
    finally:
        remove(temporary)


def link(source: Path, target: Path) -> None:
    """Hard-link a file to another path, or copy it if that fails; raise OSError if both fail.

    A link is as good as a copy, because nothing here changes a file in place.
    """
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without hard links
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file to disk, and a folder's entries if the file system can (SMB, sshfs and Lustre cannot)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def dumps(content: dict, indent: int | None = None) -> str:
    """Return a dict as JSON with its checksum."""
    return json.dumps(content | {"crc32": crc32(content)}, indent=indent)


def loads(text: str | bytes) -> dict:
    """Return the dict that dumps was given; raise ValueError if the text did not come from dumps, or is damaged."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("not JSON") from error
    if not isinstance(content, dict) or content.pop("crc32", None) != crc32(content):
        raise ValueError("wrong checksum")
    return content


def crc32(content: dict) -> str:
    """Return the CRC-32 of a dict's JSON, in hexadecimal."""
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def write_json(path: Path, content: dict) -> None:
    """Write a dict into a file as indented JSON that loads can read."""
    with atomic_write(path) as temporary:
        temporary.write_text(dumps(content, indent=2))


def append_lines(path: Path, contents: list[dict]) -> None:
    """Append dicts to a log, one per line, after dropping an incomplete last line that a killed process left.

    If this fails, it raises OSError and leaves the complete lines as they are.
    """
    with path.open("a+b", buffering=0) as file:
        size = file.tell()
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            size = path.read_bytes().rfind(b"\n") + 1
            file.truncate(size)
        try:
            text = "".join(dumps(content) + "\n" for content in contents).encode()
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def read_lines(path: Path) -> tuple[list[dict], int]:
    """Return the dicts of a log, without an incomplete last line, and how many lines are damaged."""
    text = path.read_bytes() if path.exists() else b""
    contents, damaged = [], 0
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        try:
            contents.append(loads(line))
        except ValueError:
            damaged += 1
    return contents, damaged


def load_tensors(path: Path) -> dict | None:
    """Return the dict that torch.save wrote, on the CPU and without unpickling; None if that fails."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # checks what torch.load does not: the checksums
                return None
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # damaged bytes make the readers raise almost anything
        return None
    return content if isinstance(content, dict) else None


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Lock a folder until the block, or this process, ends; yield False if another process has locked it.

    Always True on a file system without locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            locked = not isinstance(error, BlockingIOError)
        yield locked
    finally:
        os.close(descriptor)
