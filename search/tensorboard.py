"""What TensorBoard shows: every trial's curves and hyperparameters, the search as a whole, and its best model.

Each trial's events are in its own folder, those of the search in the search folder. TensorBoard groups curves by the
part of their name before the slash, and sorts the groups alphabetically.
"""

import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from tensorboard.plugins.hparams import summary_v2 as hp  # plugins.hparams.api would import TensorFlow
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from search.records import METRICS, Search, Trial

# Curves to show side by side, by group; the other metrics are in the group "training".
TAGS = {
    "accuracy": "accuracy/validation",
    "train_accuracy": "accuracy/train",
    "loss": "loss/validation",
    "train_loss": "loss/train",
}
MISTAKES_SHOWN = (5, 8)  # rows, columns
IMAGE_SCALE = 3
INK, PAPER, ACCENT = (30, 30, 30), (255, 255, 255), (31, 119, 180)


class Board:
    """Writes the events of a search and its trials as these report."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.writers: dict[str, Any] = {}  # folder → SummaryWriter, while it is written to

    def write(self, trial: Trial, num_running: int) -> None:
        """Write a trial's latest report, and the progress of the trial and the search.

        Raises:
            OSError: the events cannot be written.
        """
        report, writer = trial.reports[-1], self.trial_writer(trial)
        for metric in METRICS[1:]:
            writer.add_scalar(TAGS.get(metric, f"training/{metric}"), getattr(report, metric), report.epoch)
        if trial.best:
            for key in self.search.objective.shown:
                writer.add_scalar(f"trial/best_{key}", getattr(trial.best, key), report.epoch)
        writer.add_scalar("trial/epochs", report.epoch, report.epoch)
        if trial.end:
            writer.file_writer.add_summary(hparams({}, {})[2])  # marks the trial as successful
        writer.flush()

        trials, ranking = self.search.trials.values(), self.search.ranking()
        epochs = sum(len(each.reports) for each in trials)
        whole = self.search_writer()
        if ranking:
            metric = self.search.objective.metric
            whole.add_scalar(f"search/best_{metric}", getattr(ranking[0].best, metric), epochs)
        whole.add_scalar("search/trials_running", num_running, epochs)
        whole.add_scalar("search/trials_finished", sum(bool(each.end) for each in trials), epochs)
        whole.flush()
        if trial.end:
            self.close(trial.name)

    def trial_writer(self, trial: Trial) -> Any:
        """Return the writer of a trial's events, which begin with its hyperparameters."""
        if trial.name not in self.writers:
            # TensorBoard hides what was written for this and later epochs before a restart.
            step = trial.reports[-1].epoch
            self.writers[trial.name] = SummaryWriter(str(self.search.folder / trial.name), purge_step=step)
            values = {key: to_hparam(trial.config[key], searched) for key, searched in self.search.searched.items()}
            self.writers[trial.name].file_writer.add_summary(hp.hparams_pb(values, trial_id=trial.name))
        return self.writers[trial.name]

    def search_writer(self) -> Any:
        """Return the writer of the search's events, which begin with what is searched and what is measured."""
        if "" not in self.writers:
            self.writers[""] = SummaryWriter(str(self.search.folder))
            domains = [hp.HParam(key, domain(searched)) for key, searched in self.search.searched.items()]
            names = [*(f"best_{key}" for key in self.search.objective.shown), "epochs"]
            metrics = [hp.Metric(f"trial/{name}", display_name=name) for name in names]
            self.writers[""].file_writer.add_summary(hp.hparams_config_pb(domains, metrics))
            self.writers[""].add_text("search/methods", "\n\n".join(self.search.settings.methods()))
        return self.writers[""]

    def close(self, name: str) -> None:
        """Close a trial's events: a restarted trial begins a new file."""
        if writer := self.writers.pop(name, None):
            writer.close()

    def close_all(self) -> None:
        for name in list(self.writers):
            self.close(name)


def domain(searched: dict) -> hp.Domain | None:
    """Return the values of a hyperparameter for HPARAMS: see summarize."""
    if "values" in searched:
        return hp.Discrete(sorted({to_hparam(value, searched) for value in searched["values"]}))
    if not searched:
        return None
    lower, upper = searched["lower"], searched["upper"]
    return (hp.IntInterval if type(lower) is type(upper) is int else hp.RealInterval)(lower, upper)


def to_hparam(value: Any, searched: dict) -> Any:
    """Return a value for HPARAMS, where those of one hyperparameter must have one type."""
    types = {type(other) for other in searched.get("values", [value])}
    if types == {int, float}:
        return float(value)
    return value if len(types) == 1 else str(value)


# --- the best model on the test images --------------------------------------------------------------------------------


def show_best_model(folder: Path, probabilities: Tensor, labels: Tensor, images: Tensor, classes: tuple) -> None:
    """Write pictures of the best model's results on the test images into the search's events.

    Args:
        folder: the search folder.
        probabilities: float (N, C), on the CPU, the class probabilities of each image.
        labels: int64 (N,).
        images: uint8 (N, 32, 32, 3).
        classes: the names of the C classes.
    """
    predicted = probabilities.argmax(1)
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    confusion.index_put_((labels, predicted), torch.ones(len(labels), dtype=torch.int64), accumulate=True)
    with SummaryWriter(str(folder)) as writer:
        for name, picture in (
            ("confusion_matrix", confusion_picture(confusion, classes)),
            ("accuracy_by_class", accuracy_picture(confusion, classes)),
            ("most_confident_mistakes", mistakes_picture(probabilities, labels, images, classes)),
        ):
            tensor = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            writer.add_image(f"best_model/{name}", tensor.view(picture.height, picture.width, 3), dataformats="HWC")


def blank(width: float, height: float, size: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return a white picture, and a pen that draws on it with letters of this size in pixels."""
    picture = Image.new("RGB", (math.ceil(width), math.ceil(height)), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(size)
    return picture, draw


def widest(classes: tuple, size: int) -> float:
    """Return the width in pixels of the longest name."""
    font = ImageFont.load_default(size)
    return max(font.getlength(name) for name in classes)


def confusion_picture(confusion: Tensor, classes: tuple) -> Image.Image:
    """Draw a confusion matrix, int64 (C, C), with a row per true class and a column per predicted one."""
    cell = max(10, min(44, 900 // len(classes)))
    size = min(14, cell - 1)
    margin = widest(classes, size) + 10
    top = margin + 2 * size
    picture, draw = blank(margin + cell * len(classes) + 10, top + cell * len(classes) + 10, size)
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    draw.text((4, 4), "rows: true class; columns: predicted class", INK)
    for i, name in enumerate(classes):
        draw.text((margin - 5, top + (i + 0.5) * cell), name, INK, anchor="rm")
        upright, pen = blank(margin - 5, size + 2, size)
        pen.text((0, size / 2), name, INK, anchor="lm")
        picture.paste(upright.rotate(90, expand=True), (int(margin + (i + 0.5) * cell - size / 2), 2 * size))
        for j in range(len(classes)):
            share = shares[i, j].item()
            shade = tuple(round(p + (a - p) * share**0.5) for p, a in zip(PAPER, ACCENT, strict=True))
            x, y = margin + j * cell, top + i * cell
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=shade)
            if cell >= 30 and confusion[i, j]:
                draw.text((x + cell / 2, y + cell / 2), str(confusion[i, j].item()), INK, anchor="mm")
    return picture


def accuracy_picture(confusion: Tensor, classes: tuple) -> Image.Image:
    """Draw a bar for each class that has test images, the most accurate first."""
    counts = confusion.sum(1)
    accuracy = {classes[i]: confusion[i, i].item() / counts[i].item() for i in range(len(classes)) if counts[i]}
    margin, height, full = widest(classes, 13) + 10, 18, 400
    picture, draw = blank(margin + full + 60, height * len(accuracy) + 8, 13)
    for i, (name, value) in enumerate(sorted(accuracy.items(), key=lambda entry: -entry[1])):
        y = 4 + i * height
        draw.text((margin - 5, y + height / 2), name, INK, anchor="rm")
        draw.rectangle((margin, y + 2, margin + full * value, y + height - 2), fill=ACCENT)
        draw.text((margin + full * value + 5, y + height / 2), f"{value:.3f}", INK, anchor="lm")
    return picture


def mistakes_picture(probabilities: Tensor, labels: Tensor, images: Tensor, classes: tuple) -> Image.Image:
    """Draw the images that were misclassified with the highest probabilities, with both class names."""
    rows, columns = MISTAKES_SHOWN
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][: rows * columns]
    side = images.shape[1] * IMAGE_SCALE
    width, height = max(side + 12, widest(classes, 11) + 96), side + 36
    picture, draw = blank(width * columns, height * max(1, math.ceil(len(wrong) / columns)), 11)
    if not len(wrong):
        draw.text((4, 4), "no mistakes", INK)
    for k, i in enumerate(wrong.tolist()):
        x, y = (k % columns) * width + 6, (k // columns) * height + 4
        image = Image.fromarray(images[i].numpy()).resize((side, side), Image.Resampling.NEAREST)
        picture.paste(image, (int(x), int(y)))
        draw.text((x, y + side + 1), f"is {classes[labels[i]]}", INK)
        draw.text((x, y + side + 14), f"taken for {classes[predicted[i]]} ({confidence[i]:.2f})", (180, 30, 30))
    return picture
