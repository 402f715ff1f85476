import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from search.files import append_lines, atomic_write, dumps, load_tensors, loads, lock, read_lines, write_json
from tests.helpers import DAMAGES, disk_full_after

LINES = [{"epoch": 1, "loss": float("nan")}, {"name": "ä", "lr": 1e-5}, {"list": [1, 2.0, None, True, {}]}]


def write_text(target: Path, text: str) -> None:
    with atomic_write(target) as temporary:
        temporary.write_text(text)


def write_folder(target: Path, text: str) -> None:
    with atomic_write(target) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text(text)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("write", [write_text, write_folder])
def test_whatever_fails_a_file_is_old_or_new_and_a_folder_may_also_be_gone(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    file = target / "file" if write is write_folder else target
    for failing in range(10):
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        write(target, "old")
        steps, calls = iter(range(failing)), []

        def step(function: Callable, steps: Iterator = steps, calls: list = calls) -> Callable:
            def call(*args: object, **kwargs: object) -> object:
                calls.append(function.__name__)
                if next(steps, None) is None:
                    raise OSError(errno.EIO, "Input/output error")
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", step(os.fsync))
            patched.setattr(Path, "replace", step(Path.replace))
            patched.setattr(Path, "write_text", step(Path.write_text))
            try:
                write(target, "new")
            except OSError as error:
                message = str(error)
            else:
                break
        assert message.startswith(f"cannot write {target} (Input/output error); make room")
        assert (file.read_text() if file.exists() else "gone") in ("old", "new", "gone")
        assert file.exists() or (write is write_folder and failing)
        assert names_in(tmp_path) in (["target"], [])
    assert file.read_text() == "new"
    assert calls.index("write_text") < calls.index("fsync") < calls.index("replace")
    assert failing == len(calls) >= 4  # the last fsync is that of the parent folder


def test_json_is_read_back_or_refused() -> None:
    for content in LINES:
        text = dumps(content).encode()
        assert str(loads(text)) == str(content)
        for i in range(8 * len(text)):
            flipped = bytearray(text)
            flipped[i // 8] ^= 1 << i % 8
            with contextlib.suppress(ValueError):
                assert str(loads(bytes(flipped))) == str(content)  # only white space or an escape's case changed
    for other in ("", "[]", "3", "null", "{}", '{"crc32": 3}', "[" * 100_000):
        with pytest.raises(ValueError, match=r"."):
            loads(other)


def test_log_cut_anywhere_is_read_up_to_there_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == ([], 0)
    append_lines(path, LINES[:2])
    append_lines(path, LINES[2:])
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = whole[:size].count(b"\n")
        assert str(read_lines(path)) == str((LINES[:complete], 0))
        append_lines(path, [{"next": 1}])
        assert str(read_lines(path)) == str(([*LINES[:complete], {"next": 1}], 0))
    path.write_bytes(whole.replace(b"1e-05", b"2e-05") + b"noise\n\xff\n")
    assert str(read_lines(path)) == str(([LINES[0], LINES[2]], 3))


def test_full_disk_costs_neither_the_log_nor_a_file(tmp_path: Path) -> None:
    log, file = tmp_path / "log.jsonl", tmp_path / "file.json"
    append_lines(log, LINES[:1])
    write_json(file, LINES[1])
    before = log.read_bytes()
    with disk_full_after(len(before) + 20):
        with pytest.raises(OSError, match="No space left"):
            append_lines(log, LINES[1:])
        with pytest.raises(OSError, match=f"cannot write {file} .*make room there"):
            write_json(file, {"long": "x" * 200})
    assert (log.read_bytes(), loads(file.read_bytes())) == (before, LINES[1])
    append_lines(log, LINES[1:])
    assert str(read_lines(log)) == str((LINES, 0))
    assert names_in(tmp_path) == ["file.json", "log.jsonl"]


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def test_tensors_are_read_back_and_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, content = tmp_path / "weights.pt", {"weight": torch.randn(50), "bias": torch.randn(3)}
    assert load_tensors(path) is None
    for damage in DAMAGES.values():
        torch.save(content, path)
        loaded = load_tensors(path)
        assert list(loaded) == list(content)
        assert all(torch.equal(loaded[key], content[key]) for key in content)
        damage(path)
        assert load_tensors(path) is None
    torch.save({"weight": Malicious()}, path)
    assert load_tensors(path) is None
    assert names_in(tmp_path) == ["weights.pt"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOLCK, errno.EIO])
def test_file_systems_without_flush_or_locks_suffice_but_broken_ones_do_not(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fsync_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    def no_lock(descriptor: int, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync_files_only)
    monkeypatch.setattr(fcntl, "flock", no_lock)
    expected = pytest.raises(OSError, match="Input/output") if code == errno.EIO else contextlib.nullcontext()
    with expected:
        write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    with expected, lock(tmp_path) as locked:
        assert locked


def test_only_one_process_at_a_time_locks_a_folder(tmp_path: Path) -> None:
    for _ in range(2):
        with lock(tmp_path) as first, lock(tmp_path) as second:
            assert (first, second) == (True, False)
