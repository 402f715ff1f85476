"""What TensorBoard shows: every trial's curves and hyperparameters, the search as a whole, and its best model.

Each trial's events are in its own folder, those of the search in the search folder. TensorBoard groups curves by the
part of their name before the slash, and sorts the groups alphabetically.
"""

import contextlib
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tensorboard.plugins.hparams import summary_v2 as hp  # plugins.hparams.api would import TensorFlow
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from data import Dataset
from search.cost import COSTS, model_cost
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
INK = "#1f77b4"  # of a confusion matrix


class Board:
    """Writes the events of a search and its trials as these report."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.writers: dict[str, Any] = {}  # a trial's name, or "" for the search → SummaryWriter

    def write(self, trial: Trial) -> None:
        """Write a trial's latest report, and the search's progress; raise OSError if they cannot be written.

        A new file gets all reports: a killed process may have recorded more of them than it wrote here.
        """
        is_new = trial.name not in self.writers
        writer = self.trial_writer(trial, 1)
        for report in trial.reports if is_new else trial.reports[-1:]:
            for metric in METRICS[1:]:
                writer.add_scalar(TAGS.get(metric, f"training/{metric}"), getattr(report, metric), report.epoch)
            if best := self.search.objective.best(trial.reports[: report.epoch]):
                for key in self.search.objective.shown:
                    writer.add_scalar(f"trial/best_{key}", getattr(best, key), report.epoch)
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
            # TensorBoard hides what earlier files have for these epochs.
            writer: Any = SummaryWriter(str(self.search.folder / trial.name), purge_step=step)
            self.writers[trial.name] = writer
            values = {key: to_hparam(trial.config[key], entry) for key, entry in self.search.searched.items()}
            writer.file_writer.add_summary(hp.hparams_pb(values, trial_id=trial.name))
            for key, value in model_cost(trial.config, self.search.images["num_classes"]).items():
                writer.add_scalar(f"trial/{key}", value, step)
        return self.writers[trial.name]

    def search_writer(self, step: int) -> Any:
        """Return the writer of the search's events from `step` on; a new one begins with what is searched."""
        if "" not in self.writers:
            writer: Any = SummaryWriter(str(self.search.folder), purge_step=step)
            self.writers[""] = writer
            domains = [hp.HParam(key, self.domain(entry)) for key, entry in self.search.searched.items()]
            shown = dict.fromkeys([self.search.objective.metric, *self.search.objective.shown])
            tags = [f"trial/{key}" for key in (*(f"best_{key}" for key in shown), "epochs", *COSTS)]
            tags.append("training/images_per_second")
            metrics = [hp.Metric(tag, display_name=tag.split("/")[1]) for tag in tags]  # the first gives the colours
            writer.file_writer.add_summary(hp.hparams_config_pb(domains, metrics))
            writer.add_text("search/scheduler", self.search.settings.describe_scheduler())
        return self.writers[""]

    def domain(self, entry: dict) -> hp.Domain | None:
        """Return the values of a searched hyperparameter (see summarize) for HPARAMS."""
        values = entry.get("values")
        if values and not self.search.settings.warm_start:  # or TensorBoard would hide other values of earlier trials
            return hp.Discrete({to_hparam(value, entry) for value in values})
        ends = values or [entry.get("lower"), entry.get("upper")]
        numbers = all(type(end) in (int, float) for end in ends)
        return hp.RealInterval(float(min(ends)), float(max(ends))) if numbers else None

    def close(self, name: str) -> None:
        """Close a trial's events, ignoring write errors: a restarted trial begins a new file."""
        if writer := self.writers.pop(name, None):
            with contextlib.suppress(OSError):
                writer.close()

    def close_all(self) -> None:
        for name in list(self.writers):
            self.close(name)


def to_hparam(value: Any, entry: dict) -> float | str:
    """Return a value of a searched hyperparameter for HPARAMS, where all its values must have one type."""
    numbers = all(type(each) in (int, float) for each in [value, *entry.get("values", [])])
    return float(value) if numbers else str(value)


# --- the best model on the test images --------------------------------------------------------------------------------


def show_predictions(folder: Path, probabilities: Tensor, dataset: Dataset) -> None:
    """Write the best model's accuracy by class, confusion matrix, and worst mistakes into the search's events.

    probabilities, float (N, C) on the CPU, are those of the test images.
    """
    # Escapes line breaks, bytes that are not UTF-8, and the like.
    names = [repr(name)[1:-1] for name in dataset.classes]
    labels = [to_ascii(name) or f"class {i}" for i, name in enumerate(names)]
    true, (confidence, predicted) = dataset.test_labels, probabilities.max(1)

    accuracies = pandas.Series((predicted == true).numpy()).groupby(true.numpy()).mean().sort_values(ascending=False)
    table = "| class | accuracy |\n| --- | --- |"
    for i, accuracy in accuracies.items():
        name = names[i] if labels[i] == names[i] else f"{names[i]} ({labels[i]})"
        escaped = "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in name)  # it may be Markdown
        table += f"\n| {escaped} | {accuracy:.3f} |"

    wrong = (predicted != true).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES_SHOWN]
    captions = [f"is {labels[true[i]]}\nseen as {labels[predicted[i]]} {confidence[i]:.2f}" for i in worst]

    with SummaryWriter(str(folder)) as writer:
        writer.add_text("best_model/accuracy_by_class", table)
        matrix, mistakes = draw_confusion(true, predicted, labels), draw_mistakes(dataset.test_images[worst], captions)
        writer.add_image("best_model/confusion_matrix", matrix, dataformats="HWC")
        writer.add_image("best_model/most_confident_mistakes", mistakes, dataformats="HWC")


def to_ascii(name: str) -> str | None:
    """Return a name without accents, or None if it has other characters that the pictures' font may lack."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return plain if plain.isascii() else None


def draw_confusion(true: Tensor, predicted: Tensor, labels: Sequence[str]) -> np.ndarray:
    """Draw the confusion matrix of classes int64 (N,), a row per true and a column per predicted one, uint8 (H, W, 3).

    With more than CLASSES_SHOWN classes, it shows those most often confused.
    """
    wrong = predicted != true
    confused = torch.cat([true[wrong], predicted[wrong]]).bincount(minlength=len(labels))
    shown = confused.topk(min(CLASSES_SHOWN, len(labels))).indices.sort().values
    is_true, is_seen = ((each.unsqueeze(1) == shown).float() for each in (true, predicted))  # (N, classes shown)
    shares = is_true.T @ is_seen / is_true.sum(0).clamp(min=1).unsqueeze(1)
    cells = ImageOps.colorize(Image.fromarray((255 * (1 - shares.sqrt())).byte().numpy()), INK, "white")

    labels = [labels[i] for i in shown]
    side = max(10, min(40, 900 // len(labels)))
    font = ImageFont.load_default(min(14, side))
    left, size = math.ceil(max(map(font.getlength, labels))) + 10, side * len(labels)
    picture = Image.new("RGB", (max(220, left + size), side + size), "white")
    picture.paste(cells.resize((size, size), Image.Resampling.NEAREST), (left, side))
    for i, line in enumerate(["rows: true, columns: predicted", *labels]):
        ImageDraw.Draw(picture).text((4, i * side), line, "black", font)
    return np.array(picture)


def draw_mistakes(images: Tensor, captions: list[str]) -> np.ndarray:
    """Draw images, uint8 (N, 32, 32, 3), enlarged, in rows of 5, above captions of two lines each, uint8 (H, W, 3)."""
    font, side = ImageFont.load_default(11), 96
    width = math.ceil(max([side, *map(font.getlength, "\n".join(captions).splitlines())])) + 12
    picture = Image.new("RGB", (5 * width, (side + 36) * math.ceil(max(1, len(captions)) / 5)), "white")
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = k % 5 * width, k // 5 * (side + 36)
        picture.paste(Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(picture).text((x, y + side), caption, "black", font)
    return np.array(picture)
