import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import ResidualBlock, SmallResNet


@pytest.mark.parametrize(("h_1", "h_2", "num_classes", "batch"), [(1, 1, 1, 1), (3, 7, 10, 2), (16, 32, 100, 5)])
def test_any_widths_give_logits(h_1: int, h_2: int, num_classes: int, batch: int) -> None:
    logits = SmallResNet(h_1, h_2, 0.5, num_classes)(torch.randn(batch, 3, 32, 32))
    assert logits.shape == (batch, num_classes)
    assert logits.isfinite().all()


def test_default_size_is_small() -> None:
    model = SmallResNet(64, 512, 0.1)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 32, 32))
    assert counter.get_total_flops() < 0.6e9
    assert sum(parameter.numel() for parameter in model.parameters()) < 8e6


def test_block_is_the_identity_where_its_layers_give_nothing() -> None:
    block = ResidualBlock(4)
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_every_parameter_learns_and_dropout_is_off_in_evaluation() -> None:
    model = SmallResNet(4, 8, 0.5, 10)
    images = torch.randn(8, 3, 32, 32)
    model(images).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("h_1", 0),
        ("h_1", True),
        ("h_2", 2.0),
        ("h_2", -1),
        ("num_classes", 0),
        ("num_classes", None),
        ("p_drop", 1.0),
        ("p_drop", -0.1),
        ("p_drop", float("nan")),
        ("p_drop", "0.1"),
    ],
)
def test_bad_arguments_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} is"):
        SmallResNet(**{"h_1": 4, "h_2": 8, "p_drop": 0.1, "num_classes": 10, name: value})
