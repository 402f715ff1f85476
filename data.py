"""The images that a search trains on: three sources, one stratified split, and batches made on the trial's device.

Every source gives a `Dataset`: all images as uint8 tensors, so that they are read from disk once, shared by every trial
and moved to a GPU in one copy. `Batches` crops, flips and normalises them there.
"""

import contextlib
import hashlib
import math
import os
import socket
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

IMAGE_SIZE = 32
VALIDATION_FRACTION = 0.2
SPLIT_SEED = 0  # not the search's seed, so that searches with different seeds stay comparable
IMAGES_AT_ONCE = 1024  # images augmented and normalised together; 13 MB
MIN_IMAGES_PER_CLASS = 5  # the smallest number of which 20 % is a whole image
DOWNLOAD_TIMEOUT = 10  # seconds to wait for an answer
PICTURES_AT_ONCE = 50  # pictures that a thread reads before it reports
FAULTS_NAMED = 5  # maximum number of unreadable pictures to name
MAX_PIXELS = 50_000_000  # per picture; 150 MB when decoded
LITTER = {"thumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"}  # left in folders, besides hidden files


class InputError(ValueError):
    """The user's input cannot be used; the message is one sentence that says what is wrong and how to fix it."""


@dataclass(frozen=True)
class Dataset:
    """Images, uint8 (N, 32, 32, 3) from 0 to 255, and their labels, int64 (N,) from 0 to len(classes) - 1.

    mean and std describe the training images, one value per channel (red, green, blue), as fractions of 255.
    """

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def save_dataset(dataset: Dataset, path: Path) -> None:
    """Write a dataset into a file that other processes can map."""
    with path.open("wb") as file:
        # torch would save the whole tensor that a slice belongs to, so copy the slice.
        torch.save({key: v.clone() if isinstance(v, Tensor) else v for key, v in vars(dataset).items()}, file)


def map_dataset(path: Path) -> Dataset:
    """Map a dataset file; all processes on a machine share its images in the page cache."""
    return Dataset(**torch.load(path, mmap=True, weights_only=True))


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """Return the hexadecimal SHA-256 of each part of a dataset, keyed by its name, and the dataset's sizes."""
    parts: dict[str, Any] = {}
    for split, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        for kind in ("images", "labels"):
            parts[f"{name} {kind}"] = getattr(dataset, f"{split}_{kind}").numpy()
    parts["class names"] = repr(dataset.classes).encode()
    hashes = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}
    return hashes | {"num_classes": len(dataset.classes), "num_val": len(dataset.val_labels)}


def read_images(source: str, data_dir: str | Path, synthetic: dict) -> Dataset:
    """Read the images of a source (cifar100, folder or synthetic), and print how many there are.

    data_dir is where CIFAR-100 is or will be downloaded, or the folder; synthetic holds arguments of make_synthetic.
    Raises InputError if the images cannot be read.
    """
    try:
        if source == "synthetic":
            dataset = make_synthetic(**synthetic)
        else:
            print(f"Reading the images in {data_dir}.", flush=True)
            dataset = load_cifar100(data_dir) if source == "cifar100" else load_folder(data_dir)
    except OSError as error:
        raise InputError(f"--data-dir {data_dir} cannot be read ({error}); choose another folder") from error
    counts = [len(labels) for labels in (dataset.train_labels, dataset.val_labels, dataset.test_labels)]
    print("{} classes: {:,} training, {:,} validation and {:,} test images.".format(len(dataset.classes), *counts))
    return dataset


def load_cifar100(data_dir: str | Path) -> Dataset:
    """Read CIFAR-100 (40,000 training, 10,000 validation and 10,000 test images), and download it first if necessary.

    An archive is unpacked beside itself or, where that fails, into a temporary folder. Raises InputError if CIFAR-100
    can neither be read nor downloaded.
    """
    from torchvision.datasets import CIFAR100  # here, because it takes two seconds and trials do not need it
    from torchvision.datasets.utils import check_integrity

    timeout, archive = socket.getdefaulttimeout(), Path(data_dir, CIFAR100.filename).resolve()
    try:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        try:
            train, test = CIFAR100(data_dir, download=True), CIFAR100(data_dir, train=False)
        except OSError:
            if not check_integrity(archive, CIFAR100.tgz_md5):
                raise
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, CIFAR100.filename).symlink_to(archive)
                train, test = CIFAR100(folder, download=True), CIFAR100(folder, train=False)
    except (OSError, RuntimeError) as error:  # no network, or a failed checksum
        raise InputError(
            f"CIFAR-100 can neither be read from {Path(data_dir).resolve()} nor downloaded ({error}); "
            f"put an intact copy of {CIFAR100.url} there, or use --dataset synthetic"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    # torchvision's arrays are transposed views, which can be neither hashed nor gathered fast.
    images, test_images = (torch.from_numpy(part.data).contiguous() for part in (train, test))
    return split_dataset(images, torch.tensor(train.targets), test_images, torch.tensor(test.targets), train.classes)


def load_folder(data_dir: str | Path) -> Dataset:
    """Read `<data_dir>/train/<class>/*` and `<data_dir>/test/<class>/*` as read_picture does.

    Names that differ only in their Unicode form, as macOS and Linux write them, are one class. Hidden files and desktop
    or archive litter are ignored at any depth. Raises InputError if a folder is missing or empty, pictures cannot be
    read, there are fewer than 2 classes, a class has fewer than 5 training images, or train/ lacks a class of test/.
    """
    train, test = Path(data_dir, "train"), Path(data_dir, "test")
    train_paths, test_paths = _list_pictures(train), _list_pictures(test)
    classes = sorted(train_paths)
    if unknown := sorted(set(test_paths) - set(classes)):
        raise InputError(f"{test} has the class {unknown[0]!r}, which {train} lacks; add or remove it")
    if len(classes) < 2:
        raise InputError(f"{train} has only the class folder {classes[0]!r}; add a folder for each other class")
    for name, paths in train_paths.items():
        if len(paths) < MIN_IMAGES_PER_CLASS:
            needed = f"but a class needs at least {MIN_IMAGES_PER_CLASS}; add some, or remove the class"
            raise InputError(f"{train / name} has {len(paths)} images, {needed}")
    images, labels, faults = [], [], []
    for folder, found in ((train, train_paths), (test, test_paths)):
        images.append(_read_pictures([path for name in classes for path in found.get(name, [])], folder, faults))
        labels.append(torch.tensor([i for i, name in enumerate(classes) for _ in found.get(name, [])]))
    if faults:
        named = ", ".join(str(fault).rsplit("; ", 1)[0] for fault in faults[:FAULTS_NAMED])
        more = f", and {len(faults) - FAULTS_NAMED:,} more" if len(faults) > FAULTS_NAMED else ""
        raise InputError(f"{named}{more}; remove or replace {'them' if len(faults) > 1 else 'it'}")
    return split_dataset(images[0], labels[0], images[1], labels[1], classes)


def _list_pictures(folder: Path) -> dict[str, list[str]]:
    """Return the paths of the pictures in each class folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; use a --data-dir with train/<class>/ and test/<class>/")
    found: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not _is_litter(path.name):
            files = found.setdefault(unicodedata.normalize("NFC", path.name), [])
            files += _list_files(path)
            if not files:
                raise InputError(f"{path} has no images; add some, or remove the folder")
    if not found:
        raise InputError(f"{folder} has no class folders; put the images into {folder}/<class>/")
    return found


def _list_files(folder: str | Path) -> list[str]:
    """Return the sorted paths of the files in a folder, then of those in its subfolders."""
    files: list[str] = []
    # A link to a folder may loop, so it counts as a file, which is refused.
    for entry in sorted(os.scandir(folder), key=lambda entry: (entry.is_dir(follow_symlinks=False), entry.name)):
        if not _is_litter(entry.name):
            files += _list_files(entry.path) if entry.is_dir(follow_symlinks=False) else [entry.path]
    return files


def _is_litter(name: str) -> bool:
    return name[0] == "." or name.casefold() in LITTER


def _read_pictures(paths: list[str], folder: Path, faults: list[InputError]) -> Tensor:
    """Read pictures as uint8 (N, 32, 32, 3), and print how many were resized; append to faults why others cannot be."""
    Image.preinit()  # the common formats, tried first
    Image.init()  # the others; several threads must not load them at once
    pictures: list = []
    parts = [paths[i : i + PICTURES_AT_ONCE] for i in range(0, len(paths), PICTURES_AT_ONCE)]
    # Pillow releases Python's global lock while decoding.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as readers:
        for part in readers.map(lambda part: [_read_picture(path) for path in part], parts):
            pictures += part
            if sys.stdout.isatty():
                end = "\n" if len(pictures) == len(paths) else ""
                print(f"\r{folder}: {len(pictures):,} of {len(paths):,} images read.", end=end, flush=True)
    if unreadable := [picture for picture in pictures if isinstance(picture, InputError)]:
        faults += unreadable
        return torch.empty(0)
    if resized := sum(was_resized for _, was_resized in pictures):
        print(f"{folder}: {resized:,} of {len(paths):,} images resized to 32×32.", file=sys.stderr)
    return torch.from_numpy(np.stack([picture for picture, _ in pictures]))


def read_picture(path: str | Path) -> Tensor:
    """Read a picture in any format that Pillow opens as uint8 (32, 32, 3), resized if necessary.

    16-bit grey levels are scaled to 8 bits, transparency becomes white (except a PNG's transparent grey level of 1, 2,
    4 or 16 bits), and EXIF orientation is applied. Raises InputError if it is not an image, has over 50 million pixels,
    12-bit values, or floats or 32-bit integers of unknown range.
    """
    read = _read_picture(str(path))
    if isinstance(read, InputError):
        raise read
    return torch.from_numpy(read[0])


def _read_picture(path: str) -> tuple[np.ndarray, bool] | InputError:
    """Read a picture as read_picture does; return it and whether it was resized, or why it cannot be read."""
    if not os.path.isfile(path):  # noqa: PTH113 (opening a pipe would block)
        return InputError(f"{path} is not a regular file; check, remove or replace it")
    try:
        with Image.open(path) as opened:
            if math.prod(opened.size) > MAX_PIXELS:
                raise Image.DecompressionBombError
            picture = _to_rgb(opened)
    except InputError as error:
        return error
    except Image.DecompressionBombError:
        return InputError(f"{path} has more than {MAX_PIXELS:,} pixels; make it smaller")
    except Exception:  # Pillow's readers may raise anything
        return InputError(f"{path} cannot be read as an image; remove or replace it")
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.array(picture.resize(size, Image.Resampling.BILINEAR)), picture.size != size


def _to_rgb(picture: Any) -> Image.Image:
    """Convert an opened picture to 8-bit RGB, upright, on white."""
    is_16_bit = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if picture.mode in ("I", "F") and not is_16_bit:
        raise InputError(f"{picture.filename} has 32-bit values of unknown range; convert it to 8 or 16 bits")
    if getattr(picture, "tag_v2", {}).get(258) == (12,):  # BitsPerSample of a TIFF; Pillow does not scale it to 16 bits
        raise InputError(f"{picture.filename} has 12-bit values; convert it to 8 or 16 bits")
    picture.load()  # not within the next block, which would hide damage
    with contextlib.suppress(Exception):  # ignore damaged EXIF
        ImageOps.exif_transpose(picture, in_place=True)
    if is_16_bit:
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))  # 65535 / 255
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def make_synthetic(num_train: int = 50_000, num_test: int = 10_000, num_classes: int = 100, seed: int = 0) -> Dataset:
    """Generate images whose class is a pair of patterns, hidden among noise and a distracting third pattern.

    Each pattern belongs to many classes, has a mean of zero, and is placed and mirrored at random, so no pixel or
    colour reveals the class: a linear model stays near chance, and a network must learn all patterns.
    There must be at least 2 classes, with 5 training images each before the split, and 1 test image.
    """
    generator = torch.Generator().manual_seed(seed)
    num_patterns = math.ceil((1 + math.sqrt(1 + 8 * num_classes)) / 2)  # the fewest with a pair for every class
    # The last pattern is in no pair: it appears in images of every class.
    patterns = torch.randn(num_patterns + 1, 3, 4, 4, generator=generator)
    patterns = F.interpolate(patterns, size=(12, 12), mode="bicubic", align_corners=False)
    patterns = (patterns - patterns.mean((2, 3), keepdim=True)) / patterns.std((1, 2, 3), keepdim=True)
    pairs = torch.combinations(torch.arange(num_patterns))[:num_classes]
    labels = torch.arange(num_train + num_test) % num_classes
    chosen = torch.cat([pairs, torch.full((num_classes, 1), num_patterns)], dim=1)[labels]
    # In parts, to save memory.
    images = torch.cat([_draw_images(patterns, part, generator) for part in chosen.split(5000)])
    classes = [f"pair_{i}_{j}" for i, j in pairs.tolist()]
    return split_dataset(images[:num_train], labels[:num_train], images[num_train:], labels[num_train:], classes)


def _draw_images(patterns: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Return uint8 images (N, 32, 32, 3), each with K of the patterns (P, 3, S, S); chosen is their indices (N, K)."""
    (n, k), size = chosen.shape, patterns.shape[-1]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, k, 1, 1, generator=generator) * (high - low) + low

    top, left = uniform(0, IMAGE_SIZE - size + 1).long(), uniform(0, IMAGE_SIZE - size + 1).long()
    offsets = torch.arange(size)
    place = (top + offsets.view(1, 1, size, 1)) * IMAGE_SIZE + left + offsets.view(1, 1, 1, size)  # (N, K, S, S)
    drawn = patterns[chosen]  # (N, K, 3, S, S)
    drawn = torch.where(uniform(0, 1).unsqueeze(2) < 0.5, drawn, drawn.flip(-1)) * uniform(0.6, 1.4).unsqueeze(2)
    background = torch.randn(n, 3, 4, 4, generator=generator)
    canvas = F.interpolate(background, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    canvas = (0.6 * canvas + 0.6 * torch.randn(canvas.shape, generator=generator)).flatten(2)  # (N, 3, 1024)
    for i in range(k):
        where = place[:, i].flatten(1).unsqueeze(1).expand(-1, 3, -1)
        canvas.scatter_add_(2, where, drawn[:, i].flatten(2))
    images = (canvas * 45 + 127.5).clamp(0, 255).to(torch.uint8)
    return images.view(n, 3, IMAGE_SIZE, IMAGE_SIZE).permute(0, 2, 3, 1)


def split_dataset(
    images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, classes: list[str]
) -> Dataset:
    """Put a fifth of the training images, uint8 (N, 32, 32, 3) with labels int64 (N,), aside for validation."""
    train, val = stratified_split(labels)
    kept = images[train], labels[train], images[val], labels[val]
    return Dataset(*kept, test_images, test_labels, tuple(classes), *channel_statistics(kept[0]))


def stratified_split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split each class of labels, int64 (N,), 80/20 at random; return the sorted indices, int64, of the two parts."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]  # 0, 1, 2, … within its class
    in_validation = rank < (counts * VALIDATION_FRACTION).round()[labels[by_class]]
    return by_class[~in_validation].sort().values, by_class[in_validation].sort().values


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 images (N, H, W, 3), as fractions of 255."""
    values = torch.arange(256, dtype=torch.float64) / 255
    # Counting the 256 values is exact, and needs no float copy of all images.
    share = torch.stack([torch.bincount(images[..., c].flatten(), minlength=256) for c in range(3)]).double()
    share /= share.sum(1, keepdim=True)
    mean = share @ values
    variance = share @ values**2 - mean**2
    std = variance.clamp(min=(1 / 255) ** 2).sqrt()  # avoids a division by zero if all pixels are equal
    return tuple(mean.tolist()), tuple(std.tolist())


@dataclass(eq=False)
class Batches:
    """Normalised batches; shuffling and augmentation depend only on the seed, the epoch and the kind of device."""

    images: Tensor  # uint8 (N, 32, 32, 3), on the device of the batches
    labels: Tensor  # int64 (N,), on the same device
    batch_size: int
    mean: tuple[float, ...]  # per channel, as fractions of 255
    std: tuple[float, ...]
    shuffle: bool = False  # a new order in every epoch
    crop_padding: int = 0  # random crops after this many pixels of reflected padding, from 0 to 31
    flip: bool = False  # random flips
    seed: int = 0
    drop_last: bool = False  # skip a last, smaller batch, unless it is the only one

    def __post_init__(self) -> None:
        self.count = len(self.images)  # images per epoch
        if self.drop_last and self.count > self.batch_size:
            self.count -= self.count % self.batch_size
        self.offset, self.scale = (255 * torch.tensor(v, device=self.images.device) for v in (self.mean, self.std))

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def epoch(self, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield float32 images (B, 3, 32, 32), channels_last, and int64 labels (B,) of one epoch."""
        device, count, last = self.images.device, len(self.images), IMAGE_SIZE - 1
        generator = torch.Generator(device).manual_seed(epoch_seed(self.seed, epoch))
        order = torch.arange(count, device=device)
        if self.shuffle:
            order = torch.randperm(count, generator=generator, device=device)
        augment = self.crop_padding > 0 or self.flip
        if augment:
            low, high = -self.crop_padding, self.crop_padding + 1
            shift = torch.randint(low, high, (2, count, 1), generator=generator, device=device)
            flip = torch.rand(count, 1, generator=generator, device=device) < 0.5 * self.flip
            pixels = torch.arange(IMAGE_SIZE, device=device)
            index = torch.stack([pixels + shift[0], torch.where(flip, pixels.flip(0), pixels) + shift[1]])
            # Mirror positions outside the image about its border pixels, as reflected padding does.
            rows, columns = last - (last - index.abs()).abs()  # (N, 32) each
        # Make many batches at once: on a GPU, the work for one takes longer to launch than to compute.
        several = max(1, IMAGES_AT_ONCE // self.batch_size) * self.batch_size
        for start in range(0, self.count, several):
            part = slice(start, min(start + several, self.count))
            images, labels = self.images[order[part]], self.labels[order[part]]
            if augment:
                index = torch.arange(len(images), device=device)[:, None, None]
                images = images[index, rows[part, :, None], columns[part, None, :]]
            images = images.float().sub_(self.offset).div_(self.scale)
            images = images.permute(0, 3, 1, 2)  # NHWC seen as NCHW is channels_last
            yield from zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed for one epoch, from 0 to 2**63 - 1, different for each seed and epoch."""
    return (seed * 1_000_003 + epoch) % 2**63
