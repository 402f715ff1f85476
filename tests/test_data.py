import contextlib
import functools
import hashlib
import http.server
import io
import itertools
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.datasets import CIFAR100
from torchvision.transforms.functional import normalize, to_tensor

import data
from data import (
    Batches,
    InputError,
    channel_statistics,
    fingerprint,
    load_cifar100,
    load_folder,
    make_synthetic,
    map_dataset,
    read_picture,
    reflect,
    save_dataset,
    stratified_split,
)
from hparam_search import param_space
from tests.conftest import NAMESPACE, REPOSITORY, processes_with, wait_for
from train import new_training, train_epochs

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def random_images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)


def test_split_is_stratified_disjoint_and_always_the_same() -> None:
    labels = torch.randint(7, (1000,), generator=torch.Generator().manual_seed(1))
    train, val = stratified_split(labels)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(1000))
    for label in range(7):
        assert (labels[val] == label).sum() == round(0.2 * int((labels == label).sum()))
    assert all(torch.equal(a, b) for a, b in zip((train, val), stratified_split(labels), strict=True))
    # Not simply the first of every class.
    assert val.float().mean() == pytest.approx(500, abs=80)


def test_statistics_are_those_of_the_float_images() -> None:
    images = random_images(50)
    images[..., 2] = 128
    mean, std = channel_statistics(images)
    pixels = images.reshape(-1, 3).double() / 255
    assert mean == pytest.approx(pixels.mean(0).tolist())
    assert std[:2] == pytest.approx(pixels.std(0, correction=0)[:2].tolist())
    assert std[2] > 0


def test_plain_batches_are_what_torchvision_makes() -> None:
    images, labels = random_images(10), torch.arange(10)
    batches = Batches(images, labels, 4, MEAN, STD)
    assert len(batches) == 3
    parts = list(batches.epoch())
    assert [len(x) for x, _ in parts] == [4, 4, 2]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in parts)
    expected = torch.stack([normalize(to_tensor(image.numpy()), MEAN, STD) for image in images])
    torch.testing.assert_close(torch.cat([x for x, _ in parts]), expected)
    assert torch.cat([y for _, y in parts]).tolist() == list(range(10))


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 10), (4, [4, 4]), (5, [5, 5]), (9, [9]), (64, [10])])
def test_drop_last_makes_batches_of_one_size(batch_size: int, sizes: list[int]) -> None:
    images, labels = random_images(10), torch.arange(10)
    batches = Batches(images, labels, batch_size, MEAN, STD, shuffle=True, drop_last=True)
    seen = set()
    for epoch in range(30):
        parts = list(batches.epoch(epoch))
        assert [len(x) for x, _ in parts] == [len(y) for _, y in parts] == sizes
        drawn = set(torch.cat([y for _, y in parts]).tolist())
        assert len(drawn) == batches.count == sum(sizes)
        seen |= drawn
    assert len(batches) == len(sizes)
    assert seen == set(range(10))  # what one epoch leaves out comes in another


def test_augmented_images_are_flipped_crops_of_the_reflected_image() -> None:
    count = 300
    images = random_images(count)
    batches = Batches(images, torch.arange(count), 64, (0, 0, 0), (1 / 255,) * 3, shuffle=True, augment=True, seed=3)
    padded = F.pad(images.permute(0, 3, 1, 2).float(), (4, 4, 4, 4), mode="reflect")
    seen, crops = [], []
    for batch, labels in batches.epoch(1):
        for image, label in zip(batch, labels.tolist(), strict=True):
            windows = padded[label].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)  # (9, 9, 3, 32, 32)
            both = torch.stack([windows, windows.flip(-1)])
            match = (both == image).flatten(3).all(3).nonzero().tolist()
            assert len(match) == 1
            seen.append(label)
            crops += match
    assert sorted(seen) == list(range(count))
    assert seen != list(range(count))
    # 0.5 flipped, and every shift in either direction comes up.
    assert 100 < sum(flip for flip, _, _ in crops) < 200
    assert {row for _, row, _ in crops} == {column for _, _, column in crops} == set(range(9))


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    images, labels = random_images(40), torch.arange(40)

    def epoch(seed: int, number: int) -> torch.Tensor:
        batches = Batches(images, labels, 16, MEAN, STD, shuffle=True, augment=True, seed=seed)
        torch.rand(int(torch.randint(5, (1,))))  # the global generator has no say
        return torch.cat([x for x, _ in batches.epoch(number)])

    assert torch.equal(epoch(0, 1), epoch(0, 1))
    different = [epoch(0, 1), epoch(0, 2), epoch(1, 1), epoch(1, 2)]
    assert not any(torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


def test_reflect_is_its_own_reference() -> None:
    padded = F.pad(torch.arange(32.0).view(1, 1, 32), (4, 4), mode="reflect").flatten()
    assert reflect(torch.arange(-4, 36)).tolist() == padded.tolist()


def test_synthetic_images_are_learnable_but_not_by_a_linear_model() -> None:
    dataset = make_synthetic(num_train=1500, num_test=300, num_classes=6)
    assert torch.equal(dataset.train_images, make_synthetic(1500, 300, 6).train_images)
    assert not torch.equal(dataset.train_images, make_synthetic(1500, 300, 6, seed=1).train_images)
    assert torch.bincount(dataset.train_labels).tolist() == [200] * 6
    assert torch.bincount(dataset.test_labels).tolist() == [50] * 6

    def flat(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).double() / 255 - 0.5

    # Ridge regression on the pixels, at the best of several strengths.
    x, y = flat(dataset.train_images), F.one_hot(dataset.train_labels).double()
    linear = max(
        (flat(dataset.val_images) @ (x.T @ torch.linalg.solve(x @ x.T + strength * torch.eye(len(x)), y)))
        .argmax(1)
        .eq(dataset.val_labels)
        .double()
        .mean()
        .item()
        for strength in (1.0, 100.0, 10_000.0)
    )

    def accuracies(h_2: int, lr: float, epochs: int) -> list[float]:
        """Return the validation accuracies after the first epochs of four."""
        config = param_space | {
            "epochs": 4,
            "h_1": 16,
            "h_2": h_2,
            "p_drop": 0.1,
            "lr": lr,
            "batch_size": 32,
            "seed": 0,
        }
        device = torch.device("cpu")
        training = new_training(config, 6, device)
        trained = itertools.islice(train_epochs(training, config, dataset, device), epochs)
        return [metrics["accuracy"] for metrics in trained]

    good = accuracies(64, 0.01, 4)
    assert linear < 0.4
    assert good[3] > 0.6
    assert accuracies(2, 0.01, 2)[1] < good[1] - 0.15  # width matters
    assert accuracies(64, 1e-5, 2)[1] < good[1] - 0.15  # the learning rate matters


def test_dataset_is_mapped_not_copied(tmp_path: Path) -> None:
    dataset = make_synthetic(num_train=5000, num_test=10, num_classes=10)
    save_dataset(dataset, tmp_path / "images.pt")
    mapped = map_dataset(tmp_path / "images.pt")
    assert fingerprint(mapped) == fingerprint(dataset)
    assert (mapped.mean, mapped.std) == (dataset.mean, dataset.std)
    if Path("/proc/self/smaps").exists():
        address = mapped.train_images.data_ptr()
        ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        within = [r for r in ranges if int(r[0].split("-")[0], 16) <= address < int(r[0].split("-")[1], 16)]
        assert within[0][-1] == str(tmp_path / "images.pt")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_is_read_as_it_is(make_folder: Callable) -> None:
    folder = make_folder({"train": {"ant": 5, "bee": 10, "cat": 5}, "test": {"cat": 2, "bee": 1}})
    (folder / "train" / "ant" / ".DS_Store").write_text("left by a desktop")
    dataset = load_folder(folder)
    assert dataset.classes == ("ant", "bee", "cat")
    assert (len(dataset.train_images), len(dataset.val_images), len(dataset.test_images)) == (16, 4, 3)
    assert dataset.val_labels.tolist() == [0, 1, 1, 2]
    assert dataset.test_labels.tolist() == [1, 2, 2]  # numbered as in train/, though test/ has no ants
    first = np.array(Image.open(folder / "test" / "bee" / "000.png"))
    assert np.array_equal(dataset.test_images[0].numpy(), first)


def test_folder_takes_any_format_and_size(make_folder: Callable, capsys: pytest.CaptureFixture) -> None:
    folder = make_folder({"train": {"a": 5, "b": 5}, "test": {"a": 1, "b": 1}}, size=(40, 20))
    plain = Image.new("RGB", (32, 32), (200, 100, 50))
    plain.save(folder / "test" / "a" / "x.bmp")
    plain.convert("P").save(folder / "test" / "a" / "y.gif")
    plain.convert("L").save(folder / "test" / "a" / "z.jpg")
    plain.convert("RGBA").save(folder / "test" / "a" / "zz.webp", lossless=True)
    dataset = load_folder(folder)
    assert dataset.train_images.shape == (8, 32, 32, 3)
    bmp, _, grey, webp = dataset.test_images[1:5]
    assert bmp[0, 0].tolist() == webp[0, 0].tolist() == [200, 100, 50]
    assert len(set(grey[0, 0].tolist())) == 1
    assert capsys.readouterr().err.count("resized to 32×32") == 2  # once for train/, once for test/


def test_what_desktops_leave_is_no_class_and_no_picture(make_folder: Callable) -> None:
    classes = {"ant": 5, "bee": 5, ".ipynb_checkpoints": 3, "@eaDir": 3, "__MACOSX": 3, "ant/.thumbs": 2}
    classes |= {"bee/deep": 1, "bee/deep/@eaDir/x": 2, "$RECYCLE.BIN": 1}
    folder = make_folder({"train": classes, "test": {"ant": 1, ".Trash-0": 1}})
    for name in (".DS_Store", "._000.png", "Thumbs.db", "thumbs.db", "Desktop.ini", "Icon\r"):
        (folder / "train" / "ant" / name).write_text("left by a desktop")
    dataset = load_folder(folder)
    assert dataset.classes == ("ant", "bee")
    labels = torch.cat([dataset.train_labels, dataset.val_labels])
    assert torch.bincount(labels).tolist() == [5, 6]  # with the one in bee/deep


def test_names_of_two_unicode_forms_are_one_class(make_folder: Callable) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    folder = make_folder({"train": {decomposed: 5, "a": 5}, "test": {composed: 2, "a": 1}})
    (folder / "train" / composed).mkdir(exist_ok=True)
    Image.new("RGB", (32, 32)).save(folder / "train" / composed / "x.png")
    dataset = load_folder(folder)
    assert dataset.classes == ("a", composed)
    assert dataset.test_labels.tolist() == [0, 1, 1]
    assert len(dataset.train_labels) + len(dataset.val_labels) == 11


RAMP = np.tile(np.linspace(0, 1, 32), (32, 1))


def save_ramp(folder: Path, name: str, bits: int, tags: dict[int, int] | None = None, **options: object) -> Path:
    """Write grey levels from black on the left to white, of so many bits; a TIFF's tags can be changed."""
    path, dtype = folder / name, "uint8" if bits == 8 else "uint16"
    Image.fromarray((RAMP * (2**bits - 1)).round().astype(dtype)).save(path, **options)
    content = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", content, 4)[0] if tags else 0
    for i in range(struct.unpack_from("<H", content, start)[0] if tags else 0):
        entry = start + 2 + 12 * i
        if (tag := struct.unpack_from("<H", content, entry)[0]) in tags:
            struct.pack_into("<HH", content, entry + 8, tags[tag], 0)
    path.write_bytes(content)
    return path


def test_grey_levels_are_scaled_by_their_depth(tmp_path: Path) -> None:
    expected = torch.from_numpy((RAMP * 255).round()).unsqueeze(-1).expand(-1, -1, 3)
    (tmp_path / "ten.pgm").write_bytes(b"P5 32 32 1023\n" + (RAMP * 1023).round().astype(">u2").tobytes())
    for path in (
        save_ramp(tmp_path, "eight.png", 8),
        save_ramp(tmp_path, "sixteen.png", 16),
        save_ramp(tmp_path, "sixteen.tif", 16),
        save_ramp(tmp_path, "sixteen.jp2", 16),
        tmp_path / "ten.pgm",
    ):
        read = read_picture(path)
        assert read.dtype == torch.uint8
        assert (read - expected).abs().max() <= 1, path
    # White is zero, as scanners of X-rays write it.
    assert (read_picture(save_ramp(tmp_path, "white.tif", 16, {262: 0})) - expected.flip(1)).abs().max() <= 1
    for dtype in ("int32", "float32"):
        Image.fromarray((RAMP * 1000).astype(dtype)).save(tmp_path / "wide.tif")
        with pytest.raises(InputError, match=r"wide.tif has 32-bit values of unknown range; convert"):
            read_picture(tmp_path / "wide.tif")


def test_what_is_transparent_shows_white(tmp_path: Path) -> None:
    black, alpha = np.zeros((32, 32), "uint8"), np.zeros((32, 32), "uint8")
    alpha[4:9, 5:20], alpha[20:, 20:] = 255, 128
    icon = Image.fromarray(np.stack([black, black, black, alpha], -1), "RGBA")
    expected = torch.from_numpy(255 - alpha).unsqueeze(-1).expand(-1, -1, 3)
    icon.save(tmp_path / "rgba.png")
    icon.save(tmp_path / "rgba.webp", lossless=True)
    icon.convert("LA").save(tmp_path / "la.png")
    for name in ("rgba.png", "rgba.webp", "la.png"):
        assert torch.equal(read_picture(tmp_path / name), expected), name
    # Transparent colours, also in palettes.
    opaque = Image.fromarray(np.where(alpha == 255, 0, 200).astype("uint8"))
    opaque.save(tmp_path / "grey.png", transparency=200)
    opaque.convert("P").save(tmp_path / "palette.png", transparency=200)
    opaque.convert("P").save(tmp_path / "palette.gif", transparency=200)
    opaque.convert("RGB").save(tmp_path / "rgb.png", transparency=(200, 200, 200))
    save_ramp(tmp_path, "sixteen.png", 16, transparency=65535)
    expected = torch.from_numpy(np.where(alpha == 255, 0, 255)).unsqueeze(-1).expand(-1, -1, 3)
    for name in ("grey.png", "palette.png", "palette.gif", "rgb.png"):
        assert torch.equal(read_picture(tmp_path / name), expected), name
    # All pixels of the transparent colour, in depths that Pillow does not write.
    for depth, colour, pixels, key in (
        (1, 0, b"\0\0\0\0", b"\0\0"),
        (1, 0, b"\xff\xff\xff\xff", b"\0\1"),
        (2, 0, b"\x55" * 8, b"\0\1"),
        (4, 0, b"\x55" * 16, b"\0\5"),
        (16, 2, b"\x12\x34\x56\x78\x9a\xbc" * 32, b"\x12\x34\x56\x78\x9a\xbc"),
    ):
        header = struct.pack(">IIBBBBB", 32, 32, depth, colour, 0, 0, 0)
        chunks = (b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress((b"\0" + pixels) * 32)), (b"IEND", b"")
        parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
        (tmp_path / "few.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
        assert (read_picture(tmp_path / "few.png") == 255).all(), (depth, key)
    save_ramp(tmp_path, "sixteen.png", 16, transparency=0)
    assert read_picture(tmp_path / "sixteen.png")[0, :2, 0].tolist() == [255, 8]


def test_damaged_pixels_are_refused(tmp_path: Path) -> None:
    Image.effect_noise((40, 40), 90).convert("RGB").save(tmp_path / "noise.png")
    content, refused = bytearray((tmp_path / "noise.png").read_bytes()), 0
    for place in range(60, len(content) - 20, 97):
        damaged = bytes(content[:place]) + bytes([content[place] ^ 16]) + bytes(content[place + 1 :])
        (tmp_path / "noise.png").write_bytes(damaged)
        try:
            Image.open(tmp_path / "noise.png").convert("RGB")
        except Exception:  # of Pillow
            refused += 1
            with pytest.raises(InputError, match=r"noise.png cannot be read as an image"):
                read_picture(tmp_path / "noise.png")
    assert refused > 10


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_says_which_side_is_up(orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((32, 32, 3), "uint8")
    upright[:16, :16], upright[:16, 16:] = 255, 160  # all eight ways to lie differ
    # As the standard has it: what was the top row is now which side, and so on.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "phone.jpg", exif=exif, quality=100, subsampling=0)
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "phone.png", exif=exif)
    for name in ("phone.jpg", "phone.png"):
        assert (read_picture(tmp_path / name).int() - torch.from_numpy(upright).int()).abs().max() <= 8
    Image.fromarray(upright).save(tmp_path / "bad.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff?", quality=100)
    assert (read_picture(tmp_path / "bad.jpg").int() - torch.from_numpy(upright).int()).abs().float().mean() <= 8


def unreadable(folder: Path) -> None:
    (folder / "train" / "a" / "note.txt").write_text("no image")


def truncated(folder: Path) -> None:
    path = folder / "test" / "b" / "000.png"
    path.write_bytes(path.read_bytes()[:500])


def empty_class(folder: Path) -> None:
    (folder / "train" / "c").mkdir()


@pytest.mark.parametrize(
    ("splits", "spoil", "words"),
    [
        (
            {"train": {"images/a": 5, "images/b": 5}, "test": {"images/a": 1}},
            None,
            r"only one class folder, 'images' \(with a, b, …\), but needs at least two",
        ),
        ({}, None, "train is not a folder"),
        ({"train": {"a": 5, "b": 5}}, None, "test is not a folder"),
        ({"train": {}, "test": {"a": 1}}, lambda folder: (folder / "train").mkdir(), "train has no class folders"),
        ({"train": {"a": 5, "b": 5}, "test": {"b": 1}}, unreadable, "note.txt cannot be read as an image"),
        ({"train": {"a": 5, "b": 5}, "test": {"b": 1}}, truncated, "000.png cannot be read as an image"),
        ({"train": {"a": 5, "b": 5}, "test": {"b": 1}}, empty_class, "c has no images"),
        ({"train": {"a": 5, "b": 4}, "test": {"b": 1}}, None, "b has 4 images, but a class needs at least 5"),
        ({"train": {"a": 5, "b": 5}, "test": {"a": 1, "zebra": 1}}, None, "the class 'zebra', which .* lacks"),
    ],
)
def test_bad_folders_are_refused(
    make_folder: Callable, tmp_path: Path, splits: dict, spoil: Callable, words: str
) -> None:
    make_folder(splits)
    if spoil:
        spoil(tmp_path)
    with pytest.raises(InputError, match=words):
        load_folder(tmp_path)


def many_images(make_folder: Callable, monkeypatch: pytest.MonkeyPatch, readers: int = 2) -> Path:
    """Return a folder of images that are read by several processes."""
    monkeypatch.setattr(data, "PICTURES_FOR_READERS", 100)
    monkeypatch.setattr(data, "usable_cpus", lambda: readers)
    return make_folder({"train": {"a": 500, "b": 5}, "test": {"a": 1, "b": 1}})


def test_many_images_are_read_by_several_processes(make_folder: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = many_images(make_folder, monkeypatch)
    several = fingerprint(load_folder(folder))
    with monkeypatch.context() as patch:
        patch.setattr(data, "PICTURES_FOR_READERS", 1000)
        assert fingerprint(load_folder(folder)) == several
    truncated(folder)
    unreadable(folder)
    with pytest.raises(InputError, match=r"note.txt cannot be read as an image: remove or replace it$"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "died with exit code -9; check these"), (signal.SIGSTOP, "has not answered for 1 s; check")],
)
def test_readers_that_die_or_stall_are_named(
    number: int, words: str, make_folder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, start = many_images(make_folder, monkeypatch), multiprocessing.Process.start

    def start_and_signal(process: multiprocessing.Process) -> None:
        start(process)
        os.kill(process.pid, number)

    monkeypatch.setattr(multiprocessing.Process, "start", start_and_signal)
    monkeypatch.setattr(data, "STALLED_AFTER", 1)
    first, last = folder / "train" / "a" / "000.png", folder / "train" / "a" / "015.png"
    with pytest.raises(InputError, match=f"the process reading {first} to {last} {words}"):
        load_folder(folder)
    deadline = time.monotonic() + 5
    while multiprocessing.active_children():
        assert time.monotonic() < deadline


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_readers_do_not_outlive_a_search_that_is_killed(
    make_folder: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = many_images(make_folder, monkeypatch)
    script = f"""
import data, os, signal, time
data.PICTURES_FOR_READERS = 100
data.usable_cpus = lambda: 2
parts = data._read_parts([[{str(folder / "train" / "a" / "000.png")!r}] * 16] * 100)
next(parts)
time.sleep(0.5)  # until they wait for the pipes
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"MARK": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, env=environment, check=False)
    wait_for(lambda: not processes_with(f"MARK={tmp_path}"), 10)


@pytest.mark.skipif(not NAMESPACE, reason="no mount namespaces here, for a small /dev/shm")
def test_readers_need_no_shared_memory(make_folder: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = many_images(make_folder, monkeypatch)
    script = "import data; data.PICTURES_FOR_READERS = 100; print(len(data.load_folder({!r}).train_images))"
    mount = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
    command = [*NAMESPACE, "sh", "-c", mount, "sh", sys.executable, "-c", script.format(str(folder))]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.stdout == "404\n", result.stderr


def test_cpus_are_those_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for files, quota in (
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, math.inf),
        ({"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}, 3),
        ({}, math.inf),
    ):
        group = tmp_path / str(quota) / str(len(files))
        group.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (group / name).write_text(text + "\n")
        assert data.cpu_quota(group) == quota
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    monkeypatch.setattr(data, "cpu_quota", lambda group: math.inf)
    assert data.usable_cpus() == 3
    monkeypatch.setattr(data, "cpu_quota", lambda group: 2)
    assert data.usable_cpus() == (2 if Path("/proc/self/cgroup").exists() else 3)


# --- CIFAR-100 --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Serve a small archive in CIFAR-100's format where torchvision looks for it; yields its test images and labels."""
    rng = np.random.default_rng(0)
    contents = {"meta": {"fine_label_names": [f"class {i:02}" for i in range(100)]}}
    for split, per_class in (("train", 5), ("test", 1)):
        data = rng.integers(0, 256, (100 * per_class, 3072), dtype=np.uint8)
        labels = rng.permutation(np.repeat(np.arange(100), per_class)).tolist()
        contents[split] = {"data": data, "fine_labels": labels, "coarse_labels": [0] * len(labels)}
    served = tmp_path / "served"
    served.mkdir()
    sums = {}
    with tarfile.open(served / CIFAR100.filename, "w:gz") as archive:
        for name, content in contents.items():
            pickled = pickle.dumps(content, protocol=2)
            sums[name] = hashlib.md5(pickled).hexdigest()
            info = tarfile.TarInfo(f"{CIFAR100.base_folder}/{name}")
            info.size = len(pickled)
            archive.addfile(info, io.BytesIO(pickled))
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5((served / CIFAR100.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR100.filename}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield contents["test"]["data"], contents["test"]["fine_labels"]
        with contextlib.suppress(Exception):
            server.shutdown()
        thread.join()


def test_cifar100_is_downloaded_once(cifar_server: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_dir = tmp_path / "data"
    dataset = load_cifar100(data_dir)
    assert (len(dataset.train_images), len(dataset.val_images), len(dataset.test_images)) == (400, 100, 100)
    assert torch.bincount(dataset.val_labels).tolist() == [1] * 100
    assert dataset.classes[42] == "class 42"
    pixels, labels = cifar_server
    assert np.array_equal(dataset.test_images.numpy(), pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert dataset.test_labels.tolist() == labels
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/nobody")
    assert torch.equal(load_cifar100(data_dir).train_images, dataset.train_images)


def test_archive_that_fails_its_checksum_is_refused(cifar_server: tuple, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    archive = data_dir / CIFAR100.filename
    archive.write_bytes(b"half of an archive")
    with pytest.raises(InputError, match=r"cifar-100-python.tar.gz fails its MD5 checksum"):
        load_cifar100(data_dir)
    assert archive.read_bytes() == b"half of an archive"  # what the user put there is the user's to delete


def test_download_that_fails_its_checksum_is_refused_and_not_kept(
    cifar_server: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR100, "tgz_md5", "0" * 32)
    with pytest.raises(InputError, match="cannot be downloaded"):
        load_cifar100(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_without_network_the_sentence_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:9/{CIFAR100.filename}")
    with pytest.raises(InputError) as caught:
        load_cifar100(tmp_path / "data")
    for words in (str(tmp_path / "data"), CIFAR100.filename, "--dataset synthetic"):
        assert words in str(caught.value)


# --- any folder -------------------------------------------------------------------------------------------------------


def put_image(path: Path, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> None:
    Image.new(mode, size, 1).save(path, format="PNG")


def put_bomb(path: Path) -> None:
    """Write a PNG whose header says 60,000 × 60,000 pixels."""
    put_image(path)
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])


def put_cut(path: Path) -> None:
    Image.effect_noise((32, 32), 90).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:300])


PUTS = {
    "image": put_image,
    "large": lambda path: put_image(path, (90, 40)),
    "one pixel": lambda path: put_image(path, (1, 1)),
    "grey": lambda path: put_image(path, mode="L"),
    "palette": lambda path: put_image(path, mode="P"),
    "16 bit": lambda path: put_image(path, mode="I;16"),
    "transparent": lambda path: put_image(path, mode="RGBA"),
    "bomb": put_bomb,
    "cut": put_cut,
    "empty": Path.touch,
    "text": lambda path: path.write_text("no image"),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "to nowhere": lambda path: path.symlink_to("nowhere"),
    "to itself": lambda path: path.symlink_to(path.name),
    "to its folder": lambda path: path.symlink_to(path.parent),
    "to a device": lambda path: path.symlink_to("/dev/zero"),
    "outside": lambda path: path.symlink_to(path.parents[3] / "outside.png"),
}


def test_any_folder_is_read_or_refused(tmp_path: Path) -> None:
    put_image(tmp_path / "outside.png")
    generator, read, refusals = random.Random(0), 0, {}
    for i in range(150):
        folder = tmp_path / str(i)
        kinds = generator.choices(list(PUTS), k=2)  # of most files few are odd
        names = generator.sample(["a", "b", "Ünï ✓", ".hidden"], generator.randrange(1, 4))
        for split in ("train", "test"):
            for name in names:
                (folder / split / name).mkdir(parents=True)
                for j in range(generator.randrange(5, 9)):
                    kind = generator.choice(kinds) if generator.random() < 0.04 else "image"
                    PUTS[kind](folder / split / name / generator.choice([f"{j}.png", f"{j}", f"{j}.ü.JPG"]))
        begin = time.monotonic()
        try:
            dataset = load_folder(folder)
        except InputError as error:
            refusals[folder] = str(error)
            continue
        finally:
            assert time.monotonic() - begin < 10
        read += 1
        assert len(dataset.train_images) > 0
    assert 10 < read < 140
    assert all(str(folder) in refusal and "\n" not in refusal for folder, refusal in refusals.items())


@pytest.mark.parametrize(
    ("put", "words"),
    [
        ("bomb", "0.png has more than 50,000,000 pixels"),
        ("cut", "0.png cannot be read as an image"),
        ("pipe", "0.png is not a regular file"),
        ("to its folder", "was already read; remove the link"),
    ],
)
def test_files_that_are_no_use_are_named(put: str, words: str, make_folder: Callable) -> None:
    folder = make_folder({"train": {"a": 6, "b": 6}, "test": {"a": 2}})
    (folder / "train" / "a" / "000.png").unlink()
    PUTS[put](folder / "train" / "a" / "0.png")
    with pytest.raises(InputError, match=re.escape(words)):
        load_folder(folder)
