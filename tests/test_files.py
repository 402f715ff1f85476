import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from search import files
from search.files import load_tensors, loads, read_lines, write_json
from tests.helpers import DAMAGES, NAN, disk_full_after

LINES = [{"epoch": 1, "loss": NAN}, {"name": "ä", "lr": 1e-5}, {"list": [1, 2.0, None, True, {}]}]


def write(target: Path, text: str) -> None:
    with files.atomic_write(target) as temporary:
        if target.name == "folder":
            temporary.mkdir()
        (temporary / "file" if target.name == "folder" else temporary).write_text(text)


@pytest.mark.parametrize("name", ["file", "folder"])
def test_after_any_failure_a_file_is_old_or_new_and_a_folder_may_be_gone(name: str, tmp_path: Path) -> None:
    target, steps = tmp_path / name, []

    def failing(step: Callable) -> Callable:
        def call(*args: object) -> object:
            steps.append(step.__name__)
            if len(steps) == failing_step:
                raise OSError(errno.EIO, "Input/output error")
            return step(*args)

        return call

    for failing_step in range(10, -1, -1):
        shutil.rmtree(target, ignore_errors=True)
        write(target, "old")
        steps.clear()
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(*[OSError] if failing_step else []):
            for owner, step in ((os, "fsync"), (Path, "replace"), (Path, "write_text")):
                patch.setattr(owner, step, failing(getattr(owner, step)))
            write(target, "new")
        file = target / "file" if name == "folder" else target
        assert file.read_text() in ("old", "new") if file.exists() else name == "folder"
        assert list(tmp_path.iterdir()) == ([target] if file.exists() else [])
    assert file.read_text() == "new"
    assert steps == ["write_text", *["fsync"] * (2 if name == "folder" else 1), "replace", "fsync"]


def test_json_and_tensors_are_read_back_or_refused(tmp_path: Path) -> None:
    for content in LINES:
        write_json(tmp_path / "file.json", content)
        assert str(loads((tmp_path / "file.json").read_bytes())) == str(content)
    for other in ("", "[]", "null", "3", '{"a": 1', b"\xff{}", "[" * 100_000):
        with pytest.raises(ValueError, match=r"."):
            loads(other)
    path, content = tmp_path / "weights.pt", {"weight": torch.randn(50), "bias": torch.randn(3)}
    for damage in (Path.unlink, *DAMAGES, lambda path: torch.save({"code": os.mkdir}, path)):
        torch.save(content, path)
        torch.testing.assert_close(load_tensors(path), content, rtol=0, atol=0)
        damage(path)
        assert load_tensors(path) is None


def test_log_cut_anywhere_is_read_up_to_there_and_continued_and_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    log, file = tmp_path / "log.jsonl", tmp_path / "file.json"
    for line in LINES:
        files.append_line(log, line)
    whole = log.read_bytes()
    for size in range(len(whole) + 1):
        log.write_bytes(whole[:size])
        complete = LINES[: whole[:size].count(b"\n")]
        assert str(read_lines(log)) == str((complete, 0))
        files.append_line(log, {"next": 1})
        assert str(read_lines(log)) == str(([*complete, {"next": 1}], 0))
    log.write_bytes(whole.replace(b"1e-05", b"1e-") + b"noise\n\xff\n")
    write_json(file, LINES[1])
    with disk_full_after(log.stat().st_size + 20):
        for path, put in ((log, files.append_line), (file, write_json)):
            with pytest.raises(OSError, match=f"cannot write {path} .File too large.$"):
                put(path, {"long": "x" * 500})
    assert str((read_lines(log), loads(file.read_bytes()))) == str((([LINES[0], LINES[2]], 3), LINES[1]))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOLCK])
def test_lock_is_shared_or_not_and_disks_need_neither_it_nor_flush_folders(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, error = tmp_path / "file", OSError(code, os.strerror(code))

    def locked(*shared: bool) -> list[bool]:
        """Return for each of these locks whether it is granted while those before it are held."""
        with contextlib.ExitStack() as held:
            return [held.enter_context(files.lock(file, each)) for each in shared]

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise error

    assert locked(True, True, False) == [True, True, True]  # nothing was there to share
    assert locked(True, True, False) == [True, True, False]
    assert locked(False, False, True) == [True, False, False]
    monkeypatch.setattr(os, "fsync", refuse_folders)
    write(file, "text")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=error))
    assert locked(False, False) == [True, True]


def test_failure_to_write_names_the_file_and_the_reason_and_advises_where_that_is_known_to_help(tmp_path: Path) -> None:
    advice = dict.fromkeys([errno.ENOSPC, errno.EDQUOT], "; make room there")
    advice |= {errno.EROFS: "; make the disk writable", errno.EACCES: "; allow writing there"}
    for code in (*advice, errno.EIO, errno.ESTALE, errno.EFBIG, errno.EISDIR):
        sentence = f"cannot write {tmp_path} ({os.strerror(code)}){advice.get(code, '')}"
        outer, inner = (files.explain_failure(path) for path in (tmp_path, tmp_path / "a file in it"))
        with pytest.raises(OSError, match=f"^{re.escape(sentence)}$"), outer, inner:
            raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("other_disk", [False, True])
def test_linked_file_outlives_its_source(other_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    if other_disk:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EXDEV, "another disk")))
    source.write_text("text")
    files.link(source, target)
    assert target.samefile(source) != other_disk
    write(source, "changed")
    source.unlink()
    assert target.read_text() == "text"
