import contextlib
import errno
import fcntl
import json
import os
import stat
from pathlib import Path

import pytest

from data import InputError
from search.records import (
    append_line,
    best_first,
    holding,
    prune,
    read_log,
    read_params,
    read_search,
    sealed,
    summarise,
    unsealed,
    write_params,
    write_whole,
)
from search.trial import replacing
from tests.conftest import log_line


def test_five_best_models_are_kept(search: tuple[Path, list[dict]]) -> None:
    folder, results = search
    results[2]["status"] = "ERROR"  # not done: it may be resumed, and keeps all it has
    assert [row["trial_id"] for row in best_first(results)] == ["5", "3", "1", "6", "0", "4", "2"]
    prune(results, folder, 5)
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.pt"))
    kept = [f"trial_{i}/checkpoint_000004/weights.pt" for i in (0, 1, 3, 5, 6)]
    unfinished = [f"trial_2/{name}" for epoch in (4, 6)
                  for name in (f"checkpoint_00000{epoch}/weights.pt", f"training_00000{epoch}.pt")]  # fmt: skip
    assert left == sorted(kept + unfinished)
    assert [row["checkpoint"] is not None for row in results] == [True, True, True, True, False, True, True]


def test_files_are_written_whole_and_flushed_before_they_take_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_ino), fsync(fd)))
    path = tmp_path / "file.txt"
    write_whole(path, "one")
    write_whole(path, "two")
    assert path.read_text() == "two"
    assert flushed[-2:] == [path.stat().st_ino, tmp_path.stat().st_ino]
    with replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
        inode = (temporary / "a").stat().st_ino
        assert not (tmp_path / "folder").exists()
    assert inode in flushed
    with contextlib.suppress(OSError), replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "b").write_text("b")
        raise OSError("no room")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file.txt", "folder"]


def test_what_is_sealed_is_read_back_or_refused() -> None:
    content = {"lr": 1e-5, "loss": float("nan"), "name": "ä", "list": [1, 2.0, None, True]}
    text = sealed(content)
    assert str(unsealed(text)) == str(content)
    for i in range(8 * len(text.encode())):
        flipped = bytearray(text.encode())
        flipped[i // 8] ^= 1 << i % 8
        try:
            assert str(unsealed(bytes(flipped))) == str(content)  # only white space or the escape's case was hit
        except ValueError:
            continue
    for other in ("", "[]", "3", "null", "{}", '{"crc32": 3}', "[" * 100_000):
        with pytest.raises(ValueError, match=r"."):
            unsealed(other)


def test_log_is_read_as_far_as_it_is_one(tmp_path: Path) -> None:
    good = [
        log_line(1),
        log_line(2, loss=float("nan")),
        log_line(2, accuracy=0.4),
        log_line(3),
        {"error": "why", "time": 1.0},
    ]
    bad = [
        {"epoch": 4}, log_line(5), log_line(0), log_line(4.0), log_line(True), log_line("4"), log_line(4, accuracy=1.5),
        log_line(4, loss=float("inf")), log_line(4, loss=None), log_line(4, seconds=-1), log_line(4, lr="0.1"),
        {}, {"error": 3},
    ]  # fmt: skip
    (tmp_path / "result.json").touch()
    for line in good:
        append_line(tmp_path, sealed(line) + "\n")
    for line in bad:
        append_line(tmp_path, sealed(line) + "\n")
    append_line(tmp_path, json.dumps(log_line(4)) + "\n")  # without its checksum
    append_line(tmp_path, sealed(log_line(4))[:-20])  # not whole: of a process that was killed
    lines, others = read_log(tmp_path)
    assert (str(lines), others) == (str(good), len(bad) + 1)
    append_line(tmp_path, sealed(log_line(4)) + "\n")
    lines, others = read_log(tmp_path)
    assert (str(lines), others) == (str([*good, log_line(4)]), len(bad) + 1)
    assert read_log(tmp_path / "nothing") == ([], 0)


def test_best_epoch_is_the_one_whose_weights_lie_there(tmp_path: Path) -> None:
    def save(epoch: int, accuracy: float) -> None:
        path = tmp_path / "trial" / f"checkpoint_{epoch:06}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "weights.pt").touch()
        (path / "metrics.json").write_text(json.dumps(log_line(epoch, accuracy=accuracy)))

    def best(*lines: tuple[int, float]) -> tuple:
        log = [log_line(epoch, accuracy=accuracy) for epoch, accuracy in lines]
        row = summarise("trial", {}, log, 0, tmp_path)
        return row["best_epoch"], row["best_accuracy"], row["checkpoint"]

    assert best((1, 0.1), (2, 0.3), (3, 0.3)) == (2, 0.3, None)
    save(1, 0.1)
    save(2, 0.3)
    assert best((1, 0.1), (2, 0.3), (3, 0.2)) == (2, 0.3, "trial/checkpoint_000002")
    assert best((1, 0.1)) == (1, 0.1, "trial/checkpoint_000001")  # the second was saved, but not reported
    # Trained again from the first: other weights lie there by now than those that were reported at first.
    assert best((1, 0.1), (2, 0.4)) == (1, 0.1, "trial/checkpoint_000001")
    assert best((1, 0.1), (2, 0.4), (2, 0.3)) == (2, 0.3, "trial/checkpoint_000002")
    (tmp_path / "trial" / "checkpoint_000002" / "metrics.json").write_text("[")
    assert best((1, 0.1), (2, 0.3)) == (1, 0.1, "trial/checkpoint_000001")
    (tmp_path / "trial" / "checkpoint_000001" / "metrics.json").unlink()
    row = summarise("trial", {}, [log_line(1), log_line(2, accuracy=0.6, done=True)], 0, tmp_path)
    assert (row["best_epoch"], row["checkpoint"]) == (2, "trial/checkpoint_000002")


def test_params_of_a_trial_that_has_begun_must_be_there(tmp_path: Path) -> None:
    config = {"lr": 0.1}
    assert read_params(tmp_path / "trial") is None
    write_params(tmp_path / "trial", config)
    write_params(tmp_path / "trial", {"lr": 0.2})  # it is what the trial was drawn with
    assert unsealed((tmp_path / "trial" / "params.json").read_text()) == config
    (tmp_path / "trial" / "params.json").unlink()
    assert read_params(tmp_path / "trial") is None
    append_line(tmp_path / "trial", sealed(log_line(1)) + "\n")
    with pytest.raises(InputError, match=r"params.json is damaged .*: remove .*trial, whose trial is then drawn"):
        read_params(tmp_path / "trial")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "is of another version of this script"),
        ('{"settings": {}, "trials": {"train_cifar_00000": {}}}', "is of another version"),
        (sealed({"format": 5}), "is of another version"),
        (sealed({"format": 4}), "is damaged"),
        ('{"format": 4, "settings": {}}', "its checksum does not match"),
        ("[]", "is damaged"),
        ('{"format": 4', "is damaged"),
    ],
)
def test_search_of_another_version_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(InputError, match=words):
        read_search(tmp_path)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOLCK, errno.EIO])
def test_file_systems_that_neither_flush_folders_nor_lock_are_put_up_with(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fsync_of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    def no_lock(descriptor: int, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync_of_files)
    monkeypatch.setattr(fcntl, "flock", no_lock)
    broken = pytest.raises(OSError, match="Input/output") if code == errno.EIO else contextlib.nullcontext()
    with broken:
        write_whole(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    with broken, holding(tmp_path):
        pass
