"""What TensorBoard shows in HPARAMS, and of a best model whose classes have odd names, or are many."""

import html
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from search import tensorboard
from search.tensorboard import INK, Board, draw_confusion, show_predictions
from tests.helpers import IMAGES, add, search_in


def test_hparams_have_the_objective_first_and_one_type_each(tmp_path: Path) -> None:
    search = search_in(tmp_path, "train_loss", "min", scheduler="none")
    for key, values in {"momentum": [0, 0.5], "flip": [True, False]}.items():
        search.space[key] = {"tune": "choice", "values": values}
    search.space["ema_decay"] = {}  # a user's function
    board, name = Board(search), add(search, 0.5)
    board.write(search.trials[name])
    board.close_all()
    content = EventAccumulator(str(tmp_path)).Reload().summary_metadata["_hparams_/experiment"].plugin_data.content
    experiment = HParamsPluginData.FromString(content).experiment
    tags = [info.name.tag for info in experiment.metric_infos]
    assert tags[:3] == ["trial/best_train_loss", "trial/best_loss", "trial/best_accuracy"]
    domains = {info.name: info.domain_discrete.values for info in experiment.hparam_infos}
    assert [value.number_value for value in domains["momentum"]] == [0, 0.5]
    assert [value.string_value for value in domains["flip"]] == ["False", "True"]


def shown(folder: Path, classes: tuple[str, ...], num_images: int = 40) -> tuple[list[list[str]], Image.Image]:
    """Return the rows of the table of accuracies as TensorBoard shows them, and the confusion matrix."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_images) % len(classes)
    probabilities = torch.rand(num_images, len(classes), generator=generator)
    probabilities[labels != 0, labels[labels != 0]] = 2.0  # only images of the first class are mistaken
    images = IMAGES.test_images[:1].expand(num_images, -1, -1, -1)
    show_predictions(folder, probabilities, replace(IMAGES, test_images=images, test_labels=labels, classes=classes))
    events = EventAccumulator(str(folder)).Reload()
    (text,) = events.Tensors("best_model/accuracy_by_class/text_summary")[-1].tensor_proto.string_val
    found = re.findall(r"<tr>(.*?)</tr>", markdown_to_safe_html(text), re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in found]
    rows = [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in cells if row]
    matrix = events.Images("best_model/confusion_matrix")[-1].encoded_image_string
    return rows, Image.open(io.BytesIO(matrix))


def test_odd_class_names_are_shown_as_they_are_or_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(tensorboard, "draw_confusion", lambda *rest: drawn.append(rest[2]) or draw_confusion(*rest))
    odd = {name: name for name in ("a|b", "*stars*", "_lines_", "<b>bold", "`code`", "[x](y)", "&amp;", "1. x")}
    odd |= {"café": "cafe", "猫": "class 9", "🐈 cat": "class 10", "قط": "class 11"}
    escaped = {"caf\udce9": "caf\\udce9", "two\nlines": "two\\nlines", "tab\t": "tab\\t"}
    rows, _ = shown(tmp_path, (*odd, *escaped))
    assert drawn == [[*odd.values(), *escaped.values()]]
    names = [name if name == label else f"{name} ({label})" for name, label in odd.items()]
    assert sorted(row[0] for row in rows) == sorted([*names, *escaped.values()])
    assert {row[1] for row in rows if row[0] != "a|b"} == {"1.000"}


def test_confusion_matrix_shows_the_share_of_each_class_that_is_seen_as_each(tmp_path: Path) -> None:
    true, predicted, labels = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1]), ["a" * 30, "b", "c"]
    cells = draw_confusion(true, predicted, labels)[-100::40, -100::40]  # a pixel of each cell
    white, half, full = [255] * 3, cells[0, 0].tolist(), list(ImageColor.getrgb(INK))
    assert white > half > full
    assert cells.tolist() == [[half, half, white], [white, full, white], [white, full, white]]
    rows, matrix = shown(tmp_path, tuple(f"class number {i}" for i in range(1000)), 2000)
    assert len(rows) == 1000
    assert max(matrix.size) < 1500
