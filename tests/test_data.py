import functools
import hashlib
import http.server
import itertools
import os
import pickle
import shutil
import struct
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.datasets import CIFAR100
from torchvision.transforms.functional import normalize, to_tensor

import data
from data import Batches, InputError, fingerprint, load_cifar100, load_folder, make_synthetic, read_picture
from tests.helpers import CONFIG, CPU, DAMAGES
from train import new_training, train_epochs

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NOISE = torch.randint(256, (300, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_split_is_stratified_disjoint_and_always_the_same() -> None:
    labels = torch.randint(7, (1000,), generator=torch.Generator().manual_seed(1))
    train, val = data.stratified_split(labels)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(1000))
    assert torch.bincount(labels[val]).tolist() == [round(0.2 * n) for n in torch.bincount(labels).tolist()]
    assert all(torch.equal(a, b) for a, b in zip((train, val), data.stratified_split(labels), strict=True))
    assert val.float().mean() == pytest.approx(500, abs=80)  # not simply the first of every class


def test_statistics_are_those_of_the_float_images() -> None:
    images = NOISE.clone()
    images[..., 2] = 128
    mean, std = data.channel_statistics(images)
    pixels = images.reshape(-1, 3).double() / 255
    assert mean == pytest.approx(pixels.mean(0).tolist())
    assert std == pytest.approx([*pixels.std(0, correction=0)[:2].tolist(), 1 / 255])  # never 0, to divide by it


def test_batches_are_normalised_images_in_order_or_shuffled_without_a_smaller_one() -> None:
    images, labels = NOISE[:10], torch.arange(10)
    expected = torch.stack([normalize(to_tensor(image.numpy()), MEAN, STD) for image in images])
    for size, whole, rest in ((1, [1] * 10, []), (4, [4, 4], [2]), (5, [5, 5], []), (9, [9], [1]), (64, [10], [])):
        parts = list(Batches(images, labels, size, MEAN, STD).epoch())
        assert [len(x) for x, _ in parts] == whole + rest
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in parts)
        torch.testing.assert_close(torch.cat([x for x, _ in parts]), expected)
        assert torch.equal(torch.cat([y for _, y in parts]), labels)
        orders = set()
        for seed, epoch in itertools.product(range(2), range(15)):
            batches = Batches(images, labels, size, MEAN, STD, shuffle=True, seed=seed, drop_last=True)
            parts = list(batches.epoch(epoch))
            assert [len(x) for x, _ in parts] == [len(y) for _, y in parts] == whole
            assert (len(batches), batches.count) == (len(whole), sum(whole))
            orders.add(tuple(torch.cat([y for _, y in parts]).tolist()))
        assert len(orders) == 30  # the seed and the epoch matter
        assert all(len(set(order)) == sum(whole) for order in orders)
        assert set().union(*orders) == set(range(10))  # what one epoch skips comes in another


@pytest.mark.parametrize(("padding", "flips"), [(4, True), (2, False), (0, True)])
def test_augmented_images_are_flipped_crops_of_the_reflected_image(padding: int, flips: bool) -> None:
    count = len(NOISE)
    options = {"shuffle": True, "crop_padding": padding, "flip": flips, "seed": 3}
    batches = Batches(NOISE, torch.arange(count), 64, (0, 0, 0), (1 / 255,) * 3, **options)
    padded = F.pad(NOISE.permute(0, 3, 1, 2).float(), (padding,) * 4, mode="reflect")
    seen, crops = [], []
    for (batch, labels), (again, _) in zip(batches.epoch(1), batches.epoch(1), strict=True):
        assert torch.equal(batch, again)
        for image, label in zip(batch, labels.tolist(), strict=True):
            windows = padded[label].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)  # (K, K, 3, 32, 32)
            both = torch.stack([windows, windows.flip(-1)])
            match = (both == image).flatten(3).all(3).nonzero().tolist()
            assert len(match) == 1
            seen.append(label)
            crops += match
    assert sorted(seen) == list(range(count)) != seen
    # Half or none are flipped, and every shift in either direction occurs.
    flipped = sum(flip for flip, _, _ in crops)
    assert 100 < flipped < 200 if flips else flipped == 0
    assert {row for _, row, _ in crops} == {column for _, _, column in crops} == set(range(2 * padding + 1))


def test_synthetic_images_are_learnable_but_not_by_a_linear_model() -> None:
    dataset = make_synthetic(num_train=1500, num_test=300, num_classes=6)
    assert fingerprint(dataset) == fingerprint(make_synthetic(1500, 300, 6))
    assert not torch.equal(dataset.train_images, make_synthetic(1500, 300, 6, seed=1).train_images)
    counts = [torch.bincount(labels).tolist() for labels in (dataset.train_labels, dataset.test_labels)]
    assert counts == [[200] * 6, [50] * 6]

    # Ridge regression on the pixels, at the best of several strengths.
    x, val = (images.flatten(1).double() / 255 - 0.5 for images in (dataset.train_images, dataset.val_images))
    y, linear = F.one_hot(dataset.train_labels).double(), []
    for strength in (1.0, 100.0, 10_000.0):
        weights = x.T @ torch.linalg.solve(x @ x.T + strength * torch.eye(len(x)), y)
        linear.append((val @ weights).argmax(1).eq(dataset.val_labels).double().mean())

    def accuracies(h_2: int, lr: float, epochs: int) -> list[float]:
        config = CONFIG | {"h_1": 16, "h_2": h_2, "p_drop": 0.1, "lr": lr, "seed": 0}  # four epochs
        trained = train_epochs(new_training(config, 6, CPU), config, dataset, CPU)
        return [report.accuracy for report in itertools.islice(trained, epochs)]

    good = accuracies(64, 0.01, 4)
    assert max(linear) < 0.4
    assert good[3] > 0.6
    assert accuracies(2, 0.01, 2)[1] < good[1] - 0.15  # width matters
    assert accuracies(64, 1e-5, 2)[1] < good[1] - 0.15  # the learning rate matters


def test_dataset_is_mapped_not_copied(tmp_path: Path) -> None:
    dataset = make_synthetic(num_train=5000, num_test=10, num_classes=10)
    data.save_dataset(dataset, tmp_path / "images.pt")
    mapped = data.map_dataset(tmp_path / "images.pt")
    assert fingerprint(mapped) == fingerprint(dataset)
    assert (tmp_path / "images.pt").stat().st_size < 1.1 * 5010 * 32 * 32 * 3  # no image is saved twice
    assert (mapped.mean, mapped.std) == (dataset.mean, dataset.std)
    if Path("/proc/self/maps").exists():
        assert str(tmp_path / "images.pt") in Path("/proc/self/maps").read_text()


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_is_read_in_order_without_litter(make_folder: Callable, capsys: pytest.CaptureFixture) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"  # as Linux and macOS write it
    train = {"ant": 5, "bee": 9, "bee/deep": 1, decomposed: 4, "bee/.thumbs": 2, "bee/deep/@eaDir/x": 2}
    litter = {".ipynb_checkpoints": 3, "@eaDir": 3, "__MACOSX": 3, "$RECYCLE.BIN": 1}
    folder = make_folder({"train": train | litter, "test": {composed: 2, "bee": 1, ".Trash-0": 1}})
    for name in (".DS_Store", "._000.png", "Thumbs.db", "thumbs.db", "Desktop.ini", "Icon\r"):
        (folder / "train" / "bee" / name).write_text("left by a desktop")
    (folder / "train" / composed).mkdir(exist_ok=True)  # on macOS, the same folder
    Image.new("RGB", (32, 32)).save(folder / "train" / composed / "x.png")
    Image.new("RGB", (90, 40), (200, 100, 50)).save(folder / "test" / composed / "large.webp", lossless=True)
    (folder / "train" / "ant").rename(folder / "elsewhere")
    (folder / "train" / "ant").symlink_to(folder / "elsewhere")
    dataset = data.read_images("folder", folder, {})
    assert dataset.classes == ("ant", "bee", composed)
    assert dataset.val_labels.tolist() == [0, 1, 1, 2]
    assert dataset.test_labels.tolist() == [1, 2, 2, 2]  # numbered as in train/, though test/ has no ants
    files = [folder / "test" / name for name in ("bee/000.png", f"{composed}/000.png", f"{composed}/001.png")]
    assert np.array_equal(dataset.test_images[:3].numpy(), np.stack([np.array(Image.open(file)) for file in files]))
    assert (dataset.test_images[3] == torch.tensor([200, 100, 50])).all()
    printed = capsys.readouterr()
    assert printed.out.endswith("3 classes: 16 training, 4 validation and 4 test images.\n")
    assert printed.err == f"{folder}/test: 1 of 4 images resized to 32×32.\n"


BAD = "train/a/02.png"  # read before others, but not first


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder / "test"), "test is not a folder"),
        (lambda folder: shutil.rmtree(folder / "test/a"), "test has no class folders"),
        (lambda folder: (folder / "test/a").rename(folder / "test/zebra"), "the class 'zebra', which .* lacks"),
        (lambda folder: shutil.rmtree(folder / "train/b"), "only the class folder 'a'"),
        (lambda folder: (folder / "train/c").mkdir(), "c has no images"),
        (lambda folder: (folder / "train/b/note.txt").unlink(), "b has 4 images, but a class needs at least 5"),
        (lambda folder: os.mkfifo(folder / BAD), f"{BAD} is not a regular file"),
        (lambda folder: (folder / BAD).symlink_to("nowhere"), f"{BAD} is not a regular file"),
        (lambda folder: (folder / BAD).symlink_to(folder), f"{BAD} is not a regular file"),  # a loop
        (lambda folder: (folder / BAD).write_text("no image"), f"{BAD} cannot be read as an image"),
        (lambda folder: Image.new("1", (10_000, 5_001)).save(folder / BAD), f"{BAD} has more than 50,000,000 pixels"),
        (lambda folder: DAMAGES[0](shutil.copy(folder / "train/a/000.png", folder / BAD)), f"{BAD} cannot be read"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(spoil: Callable, words: str, make_folder: Callable) -> None:
    folder = make_folder({"train": {"a": 60, "b": 4}, "test": {"a": 2}})
    (folder / "train" / "b" / "note.txt").write_text("no image")  # the first one is named
    spoil(folder)
    with pytest.raises(InputError, match=words):
        load_folder(folder)


def test_five_unreadable_pictures_are_named_and_the_others_counted(make_folder: Callable) -> None:
    folder = make_folder({split: {"a": 9, "b": 9} for split in ("train", "test")})
    paths = [path for split in ("train", "test") for path in sorted((folder / split).rglob("*.png"))]
    names = [paths[i] for i in (2, 8, 20, 21, 34)]
    for name in names:
        name.write_text("no image")
    expected = ", ".join(f"{name} cannot be read as an image" for name in names)
    with pytest.raises(InputError) as caught:
        load_folder(folder)
    assert str(caught.value) == f"{expected}; remove or replace them"
    for path in paths:
        path.write_text("no image")
    with pytest.raises(
        InputError, match=r"(\S+ cannot be read as an image, ){4}\S+ cannot be read as an image, and 31 more; r"
    ):
        load_folder(folder)


def test_ctrl_c_stops_reading(make_folder: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, opened, open_image = make_folder({"train": {"a": 3000, "b": 5}, "test": {"a": 1}}), [], Image.open

    def open_and_interrupt(path: str) -> Image.Image:
        opened.append(path)
        if len(opened) == 100:
            raise KeyboardInterrupt  # reaches the main thread where Ctrl-C does: as it waits for the readers
        return open_image(path)

    monkeypatch.setattr(Image, "open", open_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_folder(folder)
    assert len(opened) < 2900


def test_cpus_are_those_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CGROUPS", tmp_path)
    monkeypatch.setattr(data, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    assert data.usable_cpus() == 3
    for folder, own in (
        (".", ""), ("jobs/1", "0::/jobs/1/a"), ("cpu", ""), ("cpu,cpuacct/jobs/2", "4:pids:/x\n3:cpu,cpuacct:/jobs/2")
    ):  # fmt: skip
        (tmp_path / "own").write_text(own)
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for text, count in (("50000", 1), ("250000", 2), ("800000", 3), ("-1" if "cpu" in folder else "max", 3)):
            if "cpu" in folder:
                (tmp_path / folder / "cpu.cfs_period_us").write_text("100000\n")
                (tmp_path / folder / "cpu.cfs_quota_us").write_text(f"{text}\n")
            else:
                (tmp_path / folder / "cpu.max").write_text(f"{text} 100000\n")
            assert data.usable_cpus() == count


# --- pictures ---------------------------------------------------------------------------------------------------------

RAMP = np.tile(np.linspace(0, 1, 32), (32, 1))  # black on the left to white


def grey(bits: int) -> np.ndarray:
    return (RAMP * (2**bits - 1)).round().astype("uint8" if bits == 8 else "uint16")


def test_grey_levels_are_scaled_by_their_depth(tmp_path: Path) -> None:
    for name, bits in (("a.png", 8), ("b.png", 16), ("c.tif", 16), ("d.jp2", 16)):
        Image.fromarray(grey(bits)).save(tmp_path / name)
    (tmp_path / "e.pgm").write_bytes(b"P5 32 32 1023\n" + grey(10).astype(">u2").tobytes())
    levels = grey(12).reshape(-1, 2).T  # a TIFF with two of these in three bytes
    pixels = np.stack([levels[0] >> 4, (levels[0] & 15) << 4 | levels[1] >> 8, levels[1] & 255], -1).astype("uint8")
    tags = {256: 32, 257: 32, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 32, 279: pixels.size}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    (tmp_path / "f.tif").write_bytes(header + entries + bytes(4) + pixels.tobytes())
    expected = torch.from_numpy((RAMP * 255).round()).unsqueeze(-1).expand(-1, -1, 3)
    for path in sorted(tmp_path.iterdir()):
        read = read_picture(path)
        assert read.dtype == torch.uint8
        assert (read - expected).abs().max() <= 1, path
    for dtype in ("int32", "float32"):
        Image.fromarray((RAMP * 1000).astype(dtype)).save(tmp_path / "wide.tif")
        with pytest.raises(InputError, match=r"wide.tif has 32-bit values of unknown range; convert"):
            read_picture(tmp_path / "wide.tif")


def test_what_is_transparent_shows_white(tmp_path: Path) -> None:
    alpha = np.zeros((32, 32), "uint8")
    alpha[4:9, 5:20], alpha[20:, 20:] = 255, 128
    icon = Image.merge("LA", [Image.new("L", (32, 32)), Image.fromarray(alpha)])
    icon.save(tmp_path / "la.png")
    icon.convert("RGBA").save(tmp_path / "rgba.webp", lossless=True)
    for path in tmp_path.iterdir():
        assert torch.equal(read_picture(path), torch.from_numpy(255 - alpha).unsqueeze(-1).expand(-1, -1, 3)), path
    opaque = Image.fromarray(np.where(alpha == 255, 0, 200).astype("uint8"))
    opaque.save(tmp_path / "grey.png", transparency=200)
    opaque.convert("P").save(tmp_path / "palette.gif", transparency=200)
    opaque.convert("RGB").save(tmp_path / "rgb.png", transparency=(200, 200, 200))
    for name in ("grey.png", "palette.gif", "rgb.png"):
        assert np.array_equal(read_picture(tmp_path / name)[..., 0], np.where(alpha == 255, 0, 255)), name


def test_exif_says_which_side_is_up(tmp_path: Path) -> None:
    upright, exif = np.zeros((32, 32, 3), "uint8"), Image.Exif()
    upright[:16, :16], upright[:16, 16:] = 255, 160  # no two sides are alike
    exif[0x0112] = 6  # taken with the camera upright
    stored = Image.fromarray(np.rot90(upright).copy())
    stored.save(tmp_path / "phone.jpg", exif=exif, quality=100, subsampling=0)
    stored.save(tmp_path / "phone.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "damaged.png", exif=b"Exif\0\0damaged!")
    for path in tmp_path.iterdir():
        assert (read_picture(path).int() - torch.from_numpy(upright).int()).abs().max() <= 8, path


# --- CIFAR-100 --------------------------------------------------------------------------------------------------------


def test_cifar100_is_downloaded_once_and_if_damaged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small archive in CIFAR-100's format is served where torchvision looks for it."""
    rng, served = np.random.default_rng(0), tmp_path / "served"
    contents = {"meta": {"fine_label_names": [f"class {i:02}" for i in range(100)]}}
    for split, per_class in (("train", 5), ("test", 1)):
        pixels = rng.integers(0, 256, (100 * per_class, 3072), dtype=np.uint8)
        labels = rng.permutation(np.repeat(np.arange(100), per_class)).tolist()
        contents[split] = {"data": pixels, "fine_labels": labels}
        monkeypatch.setattr(CIFAR100, f"{split}_list", [[split, None]])
    served.mkdir()
    with tarfile.open(served / CIFAR100.filename, "w:gz") as archive:
        for name, content in contents.items():
            (served / name).write_bytes(pickle.dumps(content, protocol=2))
            archive.add(served / name, f"{CIFAR100.base_folder}/{name}")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5((served / CIFAR100.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": None})
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR100.filename}")

    local = tmp_path / CIFAR100.filename
    words = f"can neither be read from {tmp_path} nor downloaded .*; put an intact copy of http.*gz there, or use"
    for attribute, value in (("tgz_md5", "0" * 32), ("url", f"http://127.0.0.1:9/{CIFAR100.filename}")):
        local.write_bytes(b"half of an archive")
        with monkeypatch.context() as patch:
            patch.setattr(CIFAR100, attribute, value)
            with pytest.raises(InputError, match=words):
                data.read_images("cifar100", tmp_path, {})
    assert local.read_bytes() == b"half of an archive"

    dataset = load_cifar100(tmp_path)
    assert (len(dataset.train_images), len(dataset.val_images), len(dataset.test_images)) == (400, 100, 100)
    assert torch.bincount(dataset.val_labels).tolist() == [1] * 100
    assert dataset.classes[42] == "class 42"
    assert np.array_equal(dataset.test_images.numpy(), pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert dataset.test_labels.tolist() == labels
    server.shutdown()
    server.server_close()
    assert fingerprint(load_cifar100(tmp_path)) == fingerprint(dataset)
    unwritable = tmp_path / "unwritable"
    unwritable.mkdir()
    shutil.copy(local, unwritable)
    (unwritable / CIFAR100.base_folder).touch()  # so that the archive cannot be unpacked there
    assert fingerprint(load_cifar100(unwritable)) == fingerprint(dataset)
