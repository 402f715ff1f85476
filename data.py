"""The images a search trains on: three sources, one stratified split, and batches made on the trial's device.

Every source gives a `Dataset`: all images as uint8 tensors, so that they are read from disk once, shared by every trial
and moved to a GPU in one copy. Cropping, flipping and normalising happen there, in `Batches`.
"""

import contextlib
import hashlib
import math
import multiprocessing
import os
import socket
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR100

IMAGE_SIZE = 32
VALIDATION_FRACTION = 0.2
# A constant, not the search's seed, so that figures of searches with different seeds stay comparable.
SPLIT_SEED = 0
CROP_PADDING = 4  # pixels
IMAGES_AT_ONCE = 1024  # augmented and normalised together; 13 MB
# The smallest class of which 20 % is a whole image.
MIN_IMAGES_PER_CLASS = 5
DOWNLOAD_TIMEOUT = 10  # seconds without an answer
PICTURES_FOR_READERS = 5_000  # below this, starting processes takes longer than reading
MAX_READERS = 16  # processes that read a folder's pictures
PICTURES_AT_ONCE = 16  # read, then sent, by a process
STALLED_AFTER = 120  # seconds without an answer
MAX_PIXELS = 50_000_000  # per picture; 150 MB when decoded
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # two TIFF tags, and a value of the second
# What desktops, archives and network disks leave in folders, besides hidden files.
LITTER = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "@recycle", "#recycle", "#snapshot",
    "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip


class InputError(ValueError):
    """Something the user gave cannot be used: the message is one sentence that says what, and how to mend it."""


@dataclass(frozen=True)
class Dataset:
    """Images, uint8 (N, 32, 32, 3) from 0 to 255, and their labels, int64 (N,) from 0 to len(classes) - 1.

    mean and std are those of the training images, one per channel (red, green, blue), as fractions of 255.
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
    """Write a dataset into a file, for map_dataset in other processes.

    Raises:
        OSError: it cannot be written.
    """
    try:
        # Of a part of a larger tensor, torch would save the whole.
        torch.save({key: v.clone() if isinstance(v, Tensor) else v for key, v in vars(dataset).items()}, path)
    except (OSError, RuntimeError) as error:  # torch raises either
        raise OSError(f"{path} cannot be written ({str(error).splitlines()[0]}): make room there") from error


def map_dataset(path: Path) -> Dataset:
    """Map a dataset file; all processes on a machine share its images in the page cache."""
    return Dataset(**torch.load(path, mmap=True, weights_only=True))


def fingerprint(dataset: Dataset) -> dict[str, str]:
    """Return what tells a dataset from any other: the name of each part → its SHA-256, in hexadecimal."""
    names = {"train": "training", "val": "validation", "test": "test"}
    parts = {
        f"{names[split]} {kind}": getattr(dataset, f"{split}_{kind}").numpy()
        for split in names
        for kind in ("images", "labels")
    }
    parts["class names"] = repr(dataset.classes).encode()
    return {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}


def read_images(source: str, data_dir: str | Path, synthetic: dict) -> Dataset:
    """Return the images of one of the three sources, and print how many they are.

    Args:
        source: cifar100, folder or synthetic.
        data_dir: where CIFAR-100 is or is put, or the folder.
        synthetic: arguments of make_synthetic.

    Raises:
        InputError: they cannot be read.
    """
    try:
        if source == "cifar100":
            dataset = load_cifar100(data_dir)
        elif source == "folder":
            print(f"Reading the images in {data_dir}.", flush=True)
            dataset = load_folder(data_dir)
        else:
            dataset = make_synthetic(**synthetic)
    except OSError as error:
        raise InputError(f"--data-dir {data_dir} cannot be read ({error}): choose another") from error
    counts = [len(labels) for labels in (dataset.train_labels, dataset.val_labels, dataset.test_labels)]
    print("{} classes: {:,} training, {:,} validation and {:,} test images.".format(len(dataset.classes), *counts))
    return dataset


def load_cifar100(data_dir: str | Path) -> Dataset:
    """Read CIFAR-100 with torchvision, which downloads it into data_dir and checks its MD5 sums where need be.

    Returns:
        40,000 training, 10,000 validation and 10,000 test images of 100 classes.

    Raises:
        InputError: it is not there and cannot be downloaded, or the archive there fails its checksum.
    """
    from torchvision.datasets import CIFAR100  # here, for it takes two seconds, and trials need none of it

    try:
        train = CIFAR100(data_dir, train=True)
    except RuntimeError:  # not there, or not whole
        train = _download_cifar100(Path(data_dir))
    test = CIFAR100(data_dir, train=False)
    return split_dataset(
        torch.from_numpy(train.data),
        torch.tensor(train.targets),
        torch.from_numpy(test.data),
        torch.tensor(test.targets),
        train.classes,
    )


def _download_cifar100(data_dir: Path) -> "CIFAR100":
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import check_integrity

    archive = data_dir / CIFAR100.filename
    if not archive.exists():
        print(f"Downloading CIFAR-100 into {data_dir}.", flush=True)
    elif not check_integrity(archive, CIFAR100.tgz_md5):
        raise InputError(
            f"{archive} fails its MD5 checksum {CIFAR100.tgz_md5}: delete it, and run again to download it"
        )
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        return CIFAR100(data_dir, train=True, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a failed checksum is a RuntimeError
        raise InputError(
            f"CIFAR-100 is not in {data_dir.resolve()} and cannot be downloaded ({error}): put {CIFAR100.url} "
            "there, or try --dataset synthetic"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
        if archive.exists() and not check_integrity(archive, CIFAR100.tgz_md5):
            archive.unlink()  # a download cut short must not stand in the next run's way


def load_folder(data_dir: str | Path) -> Dataset:
    """Read `<data_dir>/train/<class>/*` and `<data_dir>/test/<class>/*`, see read_picture, and print what was resized.

    Names that differ only in their Unicode form, as macOS and Linux write them, are one class. Hidden
    files and other desktop and archive litter are ignored at any depth.

    Raises:
        InputError: a folder is missing or empty, a picture cannot be read, there are fewer than 2 classes, a class has
            fewer than 5 training images, or test/ has a class that train/ lacks.
    """
    train_paths, test_paths = _list_pictures(Path(data_dir) / "train"), _list_pictures(Path(data_dir) / "test")
    classes = sorted(train_paths)
    if unknown := sorted(set(test_paths) - set(classes)):
        raise InputError(
            f"{data_dir}/test has the class {unknown[0]!r}, which {data_dir}/train lacks: add or remove it"
        )
    if len(classes) < 2:
        inside = sorted({Path(path).relative_to(data_dir).parts[2] for path in train_paths[classes[0]][:1000]})
        raise InputError(
            f"{data_dir}/train has only one class folder, {classes[0]!r} (with {', '.join(inside[:3])}, …), but needs "
            "at least two: put the images of each class into train/<class>/"
        )
    smallest = min(classes, key=lambda name: len(train_paths[name]))
    if len(train_paths[smallest]) < MIN_IMAGES_PER_CLASS:
        raise InputError(
            f"{data_dir}/train/{smallest} has {len(train_paths[smallest])} images, but a class needs at least "
            f"{MIN_IMAGES_PER_CLASS} to be split into training and validation: add some, or remove the class"
        )
    images, labels = [], []
    for split, paths in (("train", train_paths), ("test", test_paths)):
        images.append(_read_pictures([path for name in classes for path in paths.get(name, [])], f"{data_dir}/{split}"))
        counts = torch.tensor([len(paths.get(name, [])) for name in classes])
        labels.append(torch.arange(len(classes)).repeat_interleave(counts))
    return split_dataset(images[0], labels[0], images[1], labels[1], classes)


def _list_pictures(folder: Path) -> dict[str, list[str]]:
    """Return the class names of a folder of class folders → the paths of their files, in order."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder: --dataset folder needs train/<class>/ and test/<class>/ in --data-dir"
        )
    found, seen = {}, {os.path.realpath(folder)}
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or _is_litter(entry.name):
            continue
        paths = found.setdefault(unicodedata.normalize("NFC", entry.name), [])
        for path, folders, files in os.walk(entry, onerror=_refuse, followlinks=True):
            real = os.path.realpath(path)
            if real in seen:
                raise InputError(f"{path} leads to {real}, which was already read; remove the link")
            seen.add(real)
            folders[:] = sorted(name for name in folders if not _is_litter(name))
            # Every other file counts as a picture, so that one that cannot be read is named rather than skipped.
            paths += [os.path.join(path, name) for name in sorted(files) if not _is_litter(name)]  # noqa: PTH118
    if not found:
        raise InputError(f"{folder} has no class folders: put the images into {folder}/<class>/")
    for name, paths in found.items():
        if not paths:
            raise InputError(f"{folder / name} has no images: add some, or remove the folder")
    return found


def _refuse(error: OSError) -> None:
    raise error


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.casefold() in LITTER


def _read_pictures(paths: list[str], folder: str) -> Tensor:
    """Return pictures as uint8 (N, 32, 32, 3), read by several processes if there are many."""
    parts = [paths[i : i + PICTURES_AT_ONCE] for i in range(0, len(paths), PICTURES_AT_ONCE)]
    images, resized = np.empty((len(paths), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), 0
    for i, part in enumerate(_read_parts(parts) if len(paths) > PICTURES_FOR_READERS else map(_read_part, parts)):
        if isinstance(part, InputError):
            raise part
        done = i * PICTURES_AT_ONCE + len(part[0])
        images[i * PICTURES_AT_ONCE : done] = part[0]
        resized += part[1]
        if sys.stdout.isatty():
            print(f"\r{folder}: {done:,} of {len(paths):,} images read.", end="", flush=True)
    if sys.stdout.isatty():
        print()
    if resized:
        print(f"{folder}: {resized:,} of {len(paths):,} images resized to 32×32.", file=sys.stderr)
    return torch.from_numpy(images)


def _read_parts(parts: list[list[str]]) -> Iterator[tuple[np.ndarray, int] | InputError]:
    """Yield _read_part of all parts, in order, from processes that send them through pipes.

    A DataLoader sends tensors through /dev/shm, which holds 64 MB in a container, and hangs when it is full.

    Raises:
        InputError: a process died or stalled.
    """
    readers, count = [], min(usable_cpus(), MAX_READERS)
    try:
        for i in range(count):
            receiver, sender = multiprocessing.Pipe(duplex=False)
            inherited = [receiver, *(other for _, other in readers)]
            reader = multiprocessing.Process(target=_send_parts, args=(parts[i::count], sender, inherited), daemon=True)
            reader.start()
            sender.close()  # so that recv() gets EOF if the reader dies
            readers.append((reader, receiver))
        for i, part in enumerate(parts):
            reader, receiver = readers[i % count]
            which = f"the process reading {part[0]} to {part[-1]}"
            if not receiver.poll(STALLED_AFTER):
                raise InputError(f"{which} has not answered for {STALLED_AFTER} s; check the disk and these files")
            try:
                yield receiver.recv()
            except (EOFError, OSError) as error:  # between two messages, or within one
                reader.join()
                raise InputError(
                    f"{which} died with exit code {reader.exitcode}; check these files and the free memory"
                ) from error
    finally:
        for reader, _ in readers:
            reader.kill()


def _send_parts(parts: list[list[str]], sender: Connection, inherited: list[Connection]) -> None:
    for receiver in inherited:  # or this process would wait forever for a parent that was killed
        receiver.close()
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):  # the parent gets it too, or has died
        for part in parts:
            sender.send(_read_part(part))


def _read_part(paths: list[str]) -> tuple[np.ndarray, int] | InputError:
    """Return pictures as uint8 (N, 32, 32, 3) and how many were resized, or what is wrong with one of them."""
    try:
        pictures = [_load_picture(path) for path in paths]
    except InputError as error:  # raised in a reader, it would print a traceback
        return error
    size = (IMAGE_SIZE, IMAGE_SIZE)
    resized = sum(picture.size != size for picture in pictures)
    pictures = [p if p.size == size else p.resize(size, Image.Resampling.BILINEAR) for p in pictures]
    return np.stack([np.asarray(picture) for picture in pictures]), resized


def usable_cpus() -> int:
    """Return how many CPUs this process may use: those of its affinity (taskset, SLURM), and of its cgroup's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)  # in version 2 no controllers are named
            if controllers and "cpu" not in controllers.split(","):
                continue
            group = Path("/sys/fs/cgroup", "cpu" if controllers else "", path.strip("/"))
            for ancestor in (group, *group.parents):  # the smallest quota holds
                count = min(count, cpu_quota(ancestor))
    return count


def cpu_quota(group: Path) -> float:
    """Return the CPU quota of a cgroup (v1 or v2), at least 1; inf if it has none."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # no such file; no quota ("max")
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if int(quota) > 0:
                return max(1, int(quota) // int(period))
    return math.inf


def read_picture(path: str | Path) -> Tensor:
    """Return a picture in any format that Pillow opens as uint8 (32, 32, 3), resized where need be.

    16-bit grey levels are scaled to 8, transparency becomes white, and EXIF orientation is applied.

    Raises:
        InputError: not an image, over 50 million pixels, or one of floats or 32-bit integers, whose range is unknown.
    """
    part = _read_part([str(path)])
    if isinstance(part, InputError):
        raise part
    return torch.from_numpy(part[0][0])


def _load_picture(path: str) -> Image.Image:
    """Return a picture as RGB."""
    if not Path(path).is_file():
        raise InputError(f"{path} is not a regular file: check the path, or remove it")  # opening a pipe would block
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is refused below, or harmless
            with Image.open(path) as picture:
                if math.prod(picture.size) <= MAX_PIXELS:
                    return _to_rgb(picture, path)
    except InputError:
        raise
    except Image.DecompressionBombError:
        pass
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        raise InputError(f"{path} cannot be read as an image: remove or replace it") from error
    raise InputError(f"{path} has more than {MAX_PIXELS:,} pixels: make it smaller")


def _to_rgb(picture: Image.Image, path: str) -> Image.Image:
    """Return a picture as RGB of 8 bits, the right way up, on white."""
    bits = _bits(picture, path)
    inverted = getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO
    if picture.format == "PNG":
        _scale_transparent_colour(picture)
    picture.load()  # outside the next line, which would hide damage
    with contextlib.suppress(Exception):  # ignore damaged EXIF
        picture = ImageOps.exif_transpose(picture)
    if bits > 8:
        picture = _to_8_bits(picture, bits, inverted)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _bits(picture: Image.Image, path: str) -> int:
    """Return how many bits a pixel's value has after Pillow has decoded it, or refuse one whose range is unknown."""
    if picture.mode.startswith("I;16"):
        return getattr(picture, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]  # a TIFF may have 12
    if picture.mode == "I" and picture.format in ("PNG", "PPM"):
        return 16
    if picture.mode in ("I", "F"):
        raise InputError(f"{path} has 32-bit values of unknown range; convert it to 8 or 16 bits, or remove it")
    return 8


def _scale_transparent_colour(picture: Image.Image) -> None:
    """Scale the transparent colour of a PNG as Pillow, which leaves it as it is, scales the pixels to 8 bits."""
    colour = picture.info.get("transparency")
    if isinstance(colour, int | tuple):  # bytes are a palette's
        raw_mode = picture.tile[0][3]  # of the file: grey levels of 1, 2 or 4 bits, or RGB of 16
        scale = {"1": 255, "L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}.get(raw_mode, 1)
        scaled = [int(value * scale) for value in (colour if isinstance(colour, tuple) else [colour])]
        picture.info["transparency"] = tuple(scaled) if isinstance(colour, tuple) else scaled[0]


def _to_8_bits(picture: Image.Image, bits: int, inverted: bool) -> Image.Image:
    """Return grey levels of 9 to 16 bits as L, or as LA where one of them is transparent."""
    top, levels = 2**bits - 1, np.asarray(picture).astype(np.uint32)
    scaled = (levels * 255 + top // 2) // top
    if inverted:  # Pillow does so for 8 bits only
        scaled = 255 - scaled
    result = Image.fromarray(scaled.astype(np.uint8))
    if (transparent := picture.info.get("transparency")) is not None:
        result.putalpha(Image.fromarray(255 * (levels != transparent).astype(np.uint8)))
    return result


def make_synthetic(num_train: int = 50_000, num_test: int = 10_000, num_classes: int = 100, seed: int = 0) -> Dataset:
    """Make images in which a class is a pair of patterns, somewhere in the picture, among noise and a stray pattern.

    Every pattern belongs to many classes, has a mean of zero and stands anywhere, either way round, so that no pixel
    and no colour tells the class: a linear model stays near chance, and a network must learn all patterns.

    Args:
        num_train: training images before the split, at least 5 a class.
        num_test: test images, at least 1.
        num_classes: number of classes, at least 2.
        seed: what the patterns and images are drawn from.
    """
    generator = torch.Generator().manual_seed(seed)
    num_patterns = math.ceil((1 + math.sqrt(1 + 8 * num_classes)) / 2)  # the fewest with a pair for every class
    # The last pattern is in no pair: it strays into images of every class.
    patterns = torch.randn(num_patterns + 1, 3, 4, 4, generator=generator)
    patterns = F.interpolate(patterns, size=(12, 12), mode="bicubic", align_corners=False)
    patterns = (patterns - patterns.mean((2, 3), keepdim=True)) / patterns.std((1, 2, 3), keepdim=True)
    pairs = torch.combinations(torch.arange(num_patterns))[:num_classes]
    count = num_train + num_test
    labels = torch.arange(count) % num_classes
    images = torch.empty(count, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)
    for start in range(0, count, 5000):  # a part at a time, to spare memory
        part = slice(start, start + 5000)
        pair = pairs[labels[part]]
        stray = torch.full((len(pair), 1), num_patterns)
        images[part] = _draw_images(patterns, torch.cat([pair, stray], dim=1), generator)
    classes = [f"pair_{i}_{j}" for i, j in pairs.tolist()]
    return split_dataset(images[:num_train], labels[:num_train], images[num_train:], labels[num_train:], classes)


def _draw_images(patterns: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Return uint8 images (N, 32, 32, 3) with the patterns (P, 3, S, S) that chosen, int64 (N, K), names."""
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
    mean, std = channel_statistics(images[train])
    return Dataset(
        images[train], labels[train], images[val], labels[val], test_images, test_labels, tuple(classes), mean, std
    )


def stratified_split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split 80/20, within every class, at random from a fixed seed.

    Args:
        labels: int64 (N,).

    Returns:
        Sorted indices, int64, of the training and of the validation images; each image is in one of them.
    """
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
    std = variance.clamp(min=(1 / 255) ** 2).sqrt()  # a channel of one colour is not divided by zero
    return tuple(mean.tolist()), tuple(std.tolist())


class Batches:
    """Normalised batches of images that lie on the trial's device as uint8.

    Shuffling and augmentation are a function of the seed and the epoch alone (and of the kind of device), whatever came
    before.

    Args:
        images: uint8 (N, 32, 32, 3), on the device that the batches shall be on.
        labels: int64 (N,), on the same device.
        batch_size: images a batch, at least 1.
        mean: per channel, as fractions of 255.
        std: per channel, as fractions of 255.
        shuffle: another order in every epoch.
        augment: crop every image at random after 4 pixels of reflected padding, and flip every other one.
        seed: what order and augmentation are drawn from.
        drop_last: leave out the images of a last, smaller batch, unless it is the only one.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.shuffle, self.augment, self.seed = shuffle, augment, seed
        self.count = len(images)  # in an epoch
        if drop_last and len(images) > batch_size:
            self.count -= len(images) % batch_size
        self.mean = 255 * torch.tensor(mean, device=images.device)
        self.std = 255 * torch.tensor(std, device=images.device)

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def epoch(self, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield float32 images (B, 3, 32, 32), channels_last, and int64 labels (B,) of one epoch."""
        device, count = self.images.device, len(self.images)
        generator = torch.Generator(device).manual_seed(epoch_seed(self.seed, epoch))
        order = torch.arange(count, device=device)
        if self.shuffle:
            order = torch.randperm(count, generator=generator, device=device)
        if self.augment:
            shift = torch.randint(-CROP_PADDING, CROP_PADDING + 1, (2, count, 1), generator=generator, device=device)
            flip = torch.rand(count, 1, generator=generator, device=device) < 0.5
            pixels = torch.arange(IMAGE_SIZE, device=device)
            columns = torch.where(flip, pixels.flip(0), pixels)
            rows, columns = reflect(pixels + shift[0]), reflect(columns + shift[1])  # (N, 32) each
        # Many batches at once: on a GPU, what is done for each takes longer to launch than to compute.
        several = max(1, IMAGES_AT_ONCE // self.batch_size) * self.batch_size
        for start in range(0, self.count, several):
            part = slice(start, min(start + several, self.count))
            images, labels = self.images[order[part]], self.labels[order[part]]
            if self.augment:
                index = torch.arange(len(images), device=device)[:, None, None]
                images = images[index, rows[part, :, None], columns[part, None, :]]
            images = images.float().sub_(self.mean).div_(self.std)
            images = images.permute(0, 3, 1, 2)  # NHWC seen as NCHW is channels_last
            yield from zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True)


def reflect(index: Tensor) -> Tensor:
    """Mirror pixel indices from -31 to 62 into 0 to 31, about the border pixels, as reflected padding does."""
    last = IMAGE_SIZE - 1
    return last - (last - index.abs()).abs()


def epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed for one epoch, from 0 to 2**63 - 1, that differs from that of every other seed and epoch."""
    return (seed * 1_000_003 + epoch) % 2**63
