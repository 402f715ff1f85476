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
from tests.helpers import CONFIG, CPU, DAMAGES, IMAGES
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
def test_augmented_images_are_flipped_crops_of_the_reflected_image(
    padding: int, flips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "IMAGES_AT_ONCE", 130)  # two batches
    options = {"shuffle": True, "crop_padding": padding, "flip": flips, "seed": 3}
    batches = Batches(NOISE, torch.arange(300), 64, (0, 0, 0), (1 / 255,) * 3, **options)
    padded = F.pad(NOISE.permute(0, 3, 1, 2).float(), (padding,) * 4, mode="reflect")
    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # (300, 3, K, K, 32, 32)
    seen, crops = [], []
    for (batch, labels), (again, _) in zip(batches.epoch(1), batches.epoch(1), strict=True):
        assert torch.equal(batch, again)
        for image, label in zip(batch[:, :, None, None], labels.tolist(), strict=True):
            both = torch.stack([windows[label], windows[label].flip(-1)])
            match = (both == image).all(-1).all(-1).all(1).nonzero().tolist()  # flipped, row, column
            assert len(match) == 1
            seen.append(label)
            crops += match
    assert sorted(seen) == list(range(300)) != seen
    assert crops[:128] != crops[128:256]  # drawn anew
    flipped, rows, columns = zip(*crops, strict=True)
    assert 100 < sum(flipped) < 200 if flips else not any(flipped)
    assert set(rows) == set(columns) == set(range(2 * padding + 1))  # every shift in either direction


def test_synthetic_images_are_learnable_but_not_by_a_linear_model(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_synthetic(num_train=1200, num_test=240, num_classes=6)
    assert fingerprint(dataset) == fingerprint(make_synthetic(1200, 240, 6))
    assert not torch.equal(dataset.train_images, make_synthetic(1200, 240, 6, seed=1).train_images)
    counts = [torch.bincount(labels).tolist() for labels in (dataset.train_labels, dataset.test_labels)]
    assert counts == [[160] * 6, [40] * 6]

    # Ridge regression on the pixels, at the best of several strengths.
    x, val = (images.flatten(1).double() / 255 - 0.5 for images in (dataset.train_images, dataset.val_images))
    y, linear = F.one_hot(dataset.train_labels).double(), []
    for strength in (1.0, 100.0, 10_000.0):
        weights = x.T @ torch.linalg.solve(x @ x.T + strength * torch.eye(len(x)), y)
        linear.append((val @ weights).argmax(1).eq(dataset.val_labels).double().mean())

    monkeypatch.setattr("model.STEM_CHANNELS", 16)  # faster

    def accuracy(h_2: int, lr: float) -> float:
        config = CONFIG | {"epochs": 2, "h_1": 16, "h_2": h_2, "p_drop": 0.1, "lr": lr, "batch_size": 8, "seed": 3}
        *_, last = train_epochs(new_training(config, 6, CPU), config, dataset, CPU)
        return last.accuracy

    good = accuracy(64, 0.01)
    assert max(linear) < 0.4
    assert good > 0.6
    assert accuracy(2, 0.01) < good - 0.3  # width matters
    assert accuracy(64, 1e-5) < good - 0.3  # the learning rate matters


def test_dataset_is_mapped_not_copied(tmp_path: Path) -> None:
    data.save_dataset(IMAGES, tmp_path / "images.pt")
    mapped = data.map_dataset(tmp_path / "images.pt")
    assert fingerprint(mapped) == fingerprint(IMAGES)
    assert (mapped.mean, mapped.std) == (IMAGES.mean, IMAGES.std)
    assert (tmp_path / "images.pt").stat().st_size < 1.1 * 160 * 32 * 32 * 3  # no image is saved twice
    if Path("/proc/self/maps").exists():
        assert str(tmp_path / "images.pt") in Path("/proc/self/maps").read_text()


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_is_read_in_order_without_litter(make_folder: Callable, capsys: pytest.CaptureFixture) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"  # as Linux and macOS write it
    train = {"ant": 5, "bee": 9, "bee/deep": 1, decomposed: 4, "bee/.thumbs": 2, "bee/deep/@eaDir/x": 2}
    litter = {".ipynb_checkpoints": 3, "@eaDir": 3, "__MACOSX": 3}
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
    for damaged, more in (([paths[i] for i in (2, 8, 20, 21, 34)], ""), (paths, ", and 31 more")):
        for path in damaged:
            path.write_text("no image")
        with pytest.raises(InputError) as caught:
            load_folder(folder)
        named = ", ".join(f"{path} cannot be read as an image" for path in damaged[:5])
        assert str(caught.value) == f"{named}{more}; remove or replace them"


def test_ctrl_c_stops_reading(make_folder: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, opened, open_image = make_folder({"train": {"a": 1000, "b": 5}, "test": {"a": 1}}), [], Image.open

    def open_and_interrupt(path: str) -> Image.Image:
        opened.append(path)
        if len(opened) == 100:
            raise KeyboardInterrupt  # reaches the main thread where Ctrl-C does: as it waits for the readers
        return open_image(path)

    monkeypatch.setattr(Image, "open", open_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_folder(folder)
    assert len(opened) < 900


# --- pictures ---------------------------------------------------------------------------------------------------------


def off_by(path: Path, levels: np.ndarray) -> int:
    """Read a picture, and return by how much it differs from these grey levels."""
    read = read_picture(path)
    assert (read.dtype, read.shape) == (torch.uint8, (32, 32, 3))
    return np.abs(read.numpy() - levels[..., None].astype(int)).max()


def test_grey_levels_are_scaled_by_their_depth(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 1, 32), (32, 1))  # black on the left to white
    eight, ten, sixteen = ((ramp * (2**bits - 1)).round().astype("uint16") for bits in (8, 10, 16))
    Image.fromarray(eight.astype("uint8")).save(tmp_path / "8.png")
    for name in ("16.png", "16.tif", "16.jp2"):
        Image.fromarray(sixteen).save(tmp_path / name)
    (tmp_path / "10.pgm").write_bytes(b"P5 32 32 1023\n" + ten.astype(">u2").tobytes())
    assert all(off_by(path, eight) <= 1 for path in tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "bits"), [("int32", 32), ("float32", 32), ("uint16", 12)])
def test_other_depths_are_refused(dtype: str, bits: int, tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 1000, dtype)).save(tmp_path / "x.tif")
    depth = struct.pack("<HHI", 258, 3, 1)  # in TIFF, followed by the bits per pixel
    (tmp_path / "x.tif").write_bytes((tmp_path / "x.tif").read_bytes().replace(depth + b"\x10", depth + b"\x0c"))
    with pytest.raises(InputError, match=f"x.tif has {bits}-bit values.*; convert it to 8 or 16 bits"):
        read_picture(tmp_path / "x.tif")


def test_what_is_transparent_shows_white(tmp_path: Path) -> None:
    alpha = np.zeros((32, 32), "uint8")
    alpha[4:9, 5:20], alpha[20:, 20:] = 255, 128
    icon = Image.merge("LA", [Image.new("L", (32, 32)), Image.fromarray(alpha)])
    icon.save(tmp_path / "la.png")
    icon.convert("RGBA").save(tmp_path / "rgba.webp", lossless=True)
    opaque = Image.fromarray(np.where(alpha == 255, 0, 200).astype("uint8"))
    opaque.save(tmp_path / "grey.png", transparency=200)
    opaque.convert("P").save(tmp_path / "palette.gif", transparency=200)
    opaque.convert("RGB").save(tmp_path / "rgb.png", transparency=(200, 200, 200))
    assert off_by(tmp_path / "la.png", 255 - alpha) == off_by(tmp_path / "rgba.webp", 255 - alpha) == 0
    for name in ("grey.png", "palette.gif", "rgb.png"):
        assert off_by(tmp_path / name, np.where(alpha == 255, 0, 255)) == 0, name


def test_exif_says_which_side_is_up(tmp_path: Path) -> None:
    upright, exif = np.zeros((32, 32), "uint8"), Image.Exif()
    upright[:16, :16], upright[:16, 16:] = 255, 160  # no two sides are alike
    exif[0x0112] = 6  # taken with the camera upright
    for name in ("phone.jpg", "phone.png"):
        Image.fromarray(np.rot90(upright).copy()).save(tmp_path / name, exif=exif, quality=100)
    Image.fromarray(upright).save(tmp_path / "damaged.png", exif=b"Exif\0\0damaged!")
    assert all(off_by(path, upright) <= 8 for path in tmp_path.iterdir())


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
