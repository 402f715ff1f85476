"""What TensorBoard shows of a best model whose classes have odd names, or are many."""

import html
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from search import tensorboard
from search.tensorboard import show_predictions
from tests.helpers import IMAGES


def shown(folder: Path, classes: tuple[str, ...], num_images: int = 40) -> tuple[list[list[str]], Image.Image]:
    """Return the rows of the table of accuracies as TensorBoard shows them, and the confusion matrix."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_images) % len(classes)
    probabilities = torch.rand(num_images, len(classes), generator=generator)
    probabilities[labels != 0, labels[labels != 0]] = 2.0  # only images of the first class are mistaken
    images = IMAGES.test_images[:1].expand(num_images, -1, -1, -1)
    dataset = type(IMAGES)(**vars(IMAGES) | {"test_images": images, "test_labels": labels, "classes": classes})
    show_predictions(folder, probabilities, dataset)
    events = EventAccumulator(str(folder)).Reload()
    (text,) = events.Tensors("best_model/accuracy_by_class/text_summary")[-1].tensor_proto.string_val
    found = re.findall(r"<tr>(.*?)</tr>", markdown_to_safe_html(text), re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in found]
    rows = [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in cells if row]
    matrix = events.Images("best_model/confusion_matrix")[-1].encoded_image_string
    return rows, Image.open(io.BytesIO(matrix))


def test_odd_class_names_are_shown_as_they_are_or_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = tensorboard.draw_confusion
    monkeypatch.setattr(tensorboard, "draw_confusion", lambda shares, names: drawn.append(names) or draw(shares, names))
    odd = {"a|b": "a|b", "*stars*": "*stars*", "_lines_": "_lines_", "<b>bold": "<b>bold", "`code`": "`code`"}
    odd |= {"[x](y)": "[x](y)", "café": "cafe", "猫": "class 7", "🐈 cat": "class 8", "قط": "class 9"}
    odd |= {"caf\udce9": "caf\\udce9", "two\nlines": "two\\nlines", "tab\t": "tab\\t", "&amp;": "&amp;", "1. x": "1. x"}
    rows, _ = shown(tmp_path, tuple(odd))
    assert drawn == [list(odd.values())]
    expected = [f"{name} ({label})" if label.startswith("class ") else label for name, label in odd.items()]
    expected[expected.index("cafe")] = "café"  # the font of pictures has no accents
    assert sorted(row[0] for row in rows) == sorted(expected)
    assert {row[1] for row in rows if row[0] != "a|b"} == {"1.000"}


def test_confusion_matrix_of_many_classes_shows_those_that_are_confused(tmp_path: Path) -> None:
    rows, matrix = shown(tmp_path, tuple(f"class number {i}" for i in range(1000)), 2000)
    assert len(rows) == 1000
    assert matrix.width < 1500
    assert matrix.height < 1500
