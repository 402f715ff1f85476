"""What TensorBoard shows: every trial's curves and hyperparameters, the search as a whole, and its best model.

Each trial's events are in its own folder, those of the search in the search folder. TensorBoard groups curves by the
part of their name before the slash, and sorts the groups alphabetically.
"""

import contextlib
import functools
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tensorboard.plugins.hparams import summary_v2 as hp  # plugins.hparams.api would import TensorFlow
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from data import Dataset
from search import cost
from search.records import METRICS, Search, Trial

# Curves to show side by side, by group; the other metrics are in the group "training".
TAGS = {
    "accuracy": "accuracy/validation",
    "train_accuracy": "accuracy/train",
    "loss": "loss/validation",
    "train_loss": "loss/train",
}
MISTAKES_SHOWN = 40
CLASSES_SHOWN = 100  # in a confusion matrix
NO_CHARACTER = "\U0010ffff"  # a character that no font has, drawn as the font's replacement
INK = (31, 119, 180)  # of a confusion matrix: red, green, blue


class Board:
    """Writes the events of a search and its trials as these report."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.writers: dict[str, Any] = {}  # a trial's name, or "" for the search → SummaryWriter

    def write(self, trial: Trial) -> None:
        """Write a trial's latest report, and the search's progress; raise OSError if they cannot be written."""
        report, writer = trial.reports[-1], self.trial_writer(trial, len(trial.reports))
        for metric in METRICS[1:]:
            writer.add_scalar(TAGS.get(metric, f"training/{metric}"), getattr(report, metric), report.epoch)
        if trial.best:
            for key in self.search.objective.shown:
                writer.add_scalar(f"trial/best_{key}", getattr(trial.best, key), report.epoch)
        writer.add_scalar("trial/epochs", report.epoch, report.epoch)
        writer.flush()

        trials, ranking = self.search.trials.values(), self.search.ranking()
        epochs = sum(len(each.reports) for each in trials)
        whole = self.search_writer(epochs)
        if ranking:
            metric = self.search.objective.metric
            whole.add_scalar(f"search/best_{metric}", getattr(ranking[0].best, metric), epochs)
        whole.add_scalar("search/trials_running", len(self.search.running()), epochs)
        whole.add_scalar("search/trials_finished", sum(bool(each.end) for each in trials), epochs)
        whole.flush()

    def end(self, trial: Trial) -> None:
        """Mark a trial as successful."""
        self.trial_writer(trial, len(trial.reports) + 1).file_writer.add_summary(hparams({}, {})[2])
        self.close(trial.name)

    def trial_writer(self, trial: Trial, step: int) -> Any:
        """Return the writer of a trial's events of this epoch and later ones, which begin with its hyperparameters."""
        if trial.name not in self.writers:
            # TensorBoard hides what was written for these epochs before a restart.
            self.writers[trial.name] = SummaryWriter(str(self.search.folder / trial.name), purge_step=step)
            values = {key: to_hparam(trial.config[key], searched) for key, searched in self.search.searched.items()}
            self.writers[trial.name].file_writer.add_summary(hp.hparams_pb(values, trial_id=trial.name))
            for key, value in cost.model_cost(trial.config, self.search.images["num_classes"]).items():
                self.writers[trial.name].add_scalar(f"trial/{key}", value, step)
        return self.writers[trial.name]

    def search_writer(self, step: int) -> Any:
        """Return the writer of the search's events from `step` on; a new one begins with what is searched."""
        if "" not in self.writers:
            self.writers[""] = SummaryWriter(str(self.search.folder), purge_step=step)
            known = not self.search.settings.warm_start  # trials of earlier searches may have other values
            domains = [hp.HParam(key, domain(searched, known)) for key, searched in self.search.searched.items()]
            names = [*(f"best_{key}" for key in self.search.objective.shown), "epochs", *cost.COSTS]
            metrics = [hp.Metric(f"trial/{name}", display_name=name) for name in names]
            metrics.append(hp.Metric("training/images_per_second", display_name="images_per_second"))
            self.writers[""].file_writer.add_summary(hp.hparams_config_pb(domains, metrics))
            self.writers[""].add_text("search/methods", "\n\n".join(self.search.settings.methods()))
        return self.writers[""]

    def close(self, name: str) -> None:
        """Close a trial's events, ignoring write errors: a restarted trial begins a new file."""
        if writer := self.writers.pop(name, None):
            with contextlib.suppress(OSError):
                writer.close()

    def close_all(self) -> None:
        for name in list(self.writers):
            self.close(name)


def domain(searched: dict, known: bool) -> hp.Domain | None:
    """Return the values of a hyperparameter for HPARAMS: see summarize.

    Unless all values are known, the domain is not discrete, since TensorBoard would hide others.
    """
    values = searched.get("values", [])
    if values and known:
        return hp.Discrete(sorted({to_hparam(value, searched) for value in values}))
    if values and all(type(value) in (int, float) for value in values):
        return hp.RealInterval(float(min(values)), float(max(values)))
    if values or not searched:
        return None
    lower, upper = searched["lower"], searched["upper"]
    return (hp.IntInterval if "randint" in searched["tune"] else hp.RealInterval)(lower, upper)


def to_hparam(value: Any, searched: dict) -> Any:
    """Return a value for HPARAMS, where those of one hyperparameter must have one type."""
    types = {type(other) for other in searched.get("values", [value])}
    if types == {int, float}:
        return float(value)
    return value if len(types) == 1 else str(value)


# --- the best model on the test images --------------------------------------------------------------------------------


def show_predictions(folder: Path, probabilities: Tensor, dataset: Dataset) -> None:
    """Write the best model's confusion matrix, accuracy by class, and worst mistakes into the search's events.

    probabilities, float (N, C) on the CPU, are those of the test images. With more than
    CLASSES_SHOWN classes, the matrix shows those most often confused.
    """
    names = [printable(name) for name in dataset.classes]
    labels = [drawable(name) or f"class {i}" for i, name in enumerate(names)]
    names = [name if drawable(name) else f"{name} ({label})" for name, label in zip(names, labels, strict=True)]
    true, (confidence, predicted) = dataset.test_labels, probabilities.max(1)
    tested = true.bincount(minlength=len(names))
    correct = true[predicted == true].bincount(minlength=len(names))
    rows = sorted(((correct[i] / tested[i]).item(), names[i]) for i in tested.nonzero().flatten().tolist())
    wrong = (predicted != true).nonzero().flatten()
    confused = true[wrong].bincount(minlength=len(names)) + predicted[wrong].bincount(minlength=len(names))
    shown = confused.topk(min(CLASSES_SHOWN, len(names))).indices.sort().values
    place = torch.full((len(names),), -1)
    place[shown] = torch.arange(len(shown))
    both = (place[true] >= 0) & (place[predicted] >= 0)
    shares = torch.zeros(len(shown), len(shown))
    shares.index_put_((place[true[both]], place[predicted[both]]), torch.ones(()), accumulate=True)
    shares /= tested[shown].clamp(min=1).unsqueeze(1)
    wrong = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES_SHOWN]
    captions = [f"is {labels[true[i]]}\nseen as {labels[predicted[i]]} {confidence[i]:.2f}" for i in wrong]
    with SummaryWriter(str(folder)) as writer:
        matrix = draw_confusion(shares, [labels[i] for i in shown])
        writer.add_image("best_model/confusion_matrix", np.array(matrix), dataformats="HWC")
        table = "\n".join(f"| {escape(name)} | {share:.3f} |" for share, name in reversed(rows))
        writer.add_text("best_model/accuracy_by_class", f"| class | accuracy |\n| --- | --- |\n{table}")
        mistakes = draw_mistakes(dataset.test_images[wrong], captions)
        writer.add_image("best_model/most_confident_mistakes", np.array(mistakes), dataformats="HWC")


def printable(name: str) -> str:
    """Return a name with escape codes for line breaks, bytes that are not UTF-8, and the like."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


@functools.cache
def drawable(name: str) -> str | None:
    """Return the name, or else the name without accents, if the pictures' font can show it; else None."""
    font = ImageFont.load_default(10)
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    box = bytes(font.getmask(NO_CHARACTER))
    return next((text for text in (name, plain) if all(bytes(font.getmask(c)) != box for c in text)), None)


def escape(name: str) -> str:
    """Escape a name for a Markdown table."""
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in name)


def draw_confusion(shares: Tensor, classes: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix, float (C, C) from 0 to 1: a row per true class, a column per predicted one."""
    cell = max(10, min(40, 900 // len(classes)))
    font = ImageFont.load_default(min(14, cell))
    margin = math.ceil(max(font.getlength(name) for name in classes)) + 10
    picture = Image.new("RGB", (max(220, margin + cell * len(classes)), cell * (len(classes) + 1)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 0), "rows: true, columns: predicted", "black", font)
    for i, name in enumerate(classes):
        draw.text((4, (i + 1) * cell), name, "black", font)
        for j, share in enumerate(shares[i].tolist()):
            shade = tuple(round(255 + (ink - 255) * share**0.5) for ink in INK)
            corner = margin + j * cell, (i + 1) * cell
            draw.rectangle((*corner, corner[0] + cell - 2, corner[1] + cell - 2), fill=shade)
    return picture


def draw_mistakes(images: Tensor, captions: list[str]) -> Image.Image:
    """Draw enlarged images, uint8 (N, 32, 32, 3), in rows of 5, each above its caption of two lines."""
    font, side = ImageFont.load_default(11), 96
    width = math.ceil(max([side, *(font.getlength(line) for text in captions for line in text.splitlines())])) + 12
    picture = Image.new("RGB", (5 * width, (side + 36) * math.ceil(max(1, len(captions)) / 5)), "white")
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = k % 5 * width, k // 5 * (side + 36)
        picture.paste(Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(picture).text((x, y + side), caption, "black", font)
    return picture
