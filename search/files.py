"""How a search's files survive a kill, a full disk and a power cut.

A file or folder is written under a temporary name, flushed to disk and then renamed, so it is never incomplete. A
log only grows, and an incomplete last line is dropped. Damage is noticed: JSON no longer parses, and torch's archives
have checksums.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# Advice for failures to write whose remedy is certain.
ADVICE = dict.fromkeys([errno.ENOSPC, errno.EDQUOT], "; make room there")
ADVICE |= {errno.EROFS: "; make the disk writable", errno.EACCES: "; allow writing there"}


@contextlib.contextmanager
def explain_failure(path: Path) -> Iterator[None]:
    """Turn a failure to write a file, in the block, into an OSError that names the file, the reason and any remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError in the context of an OSError
        cause: Any = error
        while cause and not getattr(cause, "errno", None):
            cause = cause.__cause__ or cause.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        advice = ADVICE.get(getattr(cause, "errno", None), "")
        raise OSError(f"cannot write {path} ({reason}){advice}") from error


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which then replaces target; raise OSError, naming it, on failure."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with explain_failure(target):
            yield temporary
            for path in [*temporary.glob("*"), temporary]:
                flush(path)
            if temporary.is_dir():
                remove(target)  # a folder cannot replace another one
            temporary.replace(target)
            flush(target.parent)
    finally:
        remove(temporary)


def link(source: Path, target: Path) -> None:
    """Hard-link a file to a new path, or copy it where that fails. Nothing here changes a file in place."""
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists and can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


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


def loads(text: str | bytes) -> dict:
    """Return the dict that a text holds as JSON; raise ValueError if it holds none."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("not JSON") from error
    if not isinstance(content, dict):
        raise ValueError("not a dict")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write a dict into a file as indented JSON; raise OSError, naming the file, if this fails."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2))


def append_line(path: Path, content: dict, durable: bool = False) -> None:
    """Append a dict to a log, as a line, after dropping an incomplete last line that a killed process left.

    With `durable`, it is on disk when this returns. If this fails, it raises OSError, naming the file, and leaves the
    complete lines as they are.
    """
    with explain_failure(path), path.open("a+b", buffering=0) as file:
        size = file.tell()
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            size = path.read_bytes().rfind(b"\n") + 1
            file.truncate(size)
        try:
            text = f"{json.dumps(content)}\n".encode()
            while text:
                text = text[file.write(text) :]  # after a partial write, the next one raises the reason
            if durable:
                os.fsync(file.fileno())
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


def save_tensors(content: dict, path: Path) -> None:
    """Write a dict of tensors and plain values; raise OSError, naming the file, if this fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # given a path, torch would hide why it fails
        torch.save(content, file)


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
def lock(path: Path, shared: bool = False) -> Iterator[bool]:
    """Lock a file until the block, or this process, ends; yield False if another process has locked it.

    Several processes can hold a shared lock, but then none an exclusive one. An exclusive lock creates the file, which
    must never be replaced. Yields True on file systems without locks.
    """
    if shared and not path.exists():
        yield True
        return
    with explain_failure(path):  # over NFS, an exclusive lock needs a file that is open for writing
        descriptor = os.open(path, os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            locked = not isinstance(error, BlockingIOError)
        yield locked
    finally:
        os.close(descriptor)
