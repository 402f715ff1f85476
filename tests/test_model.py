import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import ResidualBlock, SmallResNet


@pytest.mark.parametrize(("h_1", "h_2", "num_classes", "batch"), [(1, 1, 1, 1), (3, 7, 10, 2), (16, 32, 100, 5)])
def test_any_widths_give_logits(h_1: int, h_2: int, num_classes: int, batch: int) -> None:
    logits = SmallResNet(h_1, h_2, 0.5, num_classes)(torch.randn(batch, 3, 32, 32))
    assert logits.shape == (batch, num_classes)
    assert logits.isfinite().all()


def test_model_has_the_size_that_its_docstring_names() -> None:
    for (h_1, h_2), parameters, flops in (((64, 512), 5.2e6, 0.42e9), ((128, 1024), 20.5e6, 1.51e9)):
        model = SmallResNet(h_1, h_2, 0.1)
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 32, 32))
        assert counter.get_total_flops() == pytest.approx(flops, rel=0.01)
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.01)


def test_block_is_the_identity_if_its_layers_give_zero() -> None:
    block = ResidualBlock(4)
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_every_parameter_learns_and_dropout_is_off_in_evaluation() -> None:
    model, images = SmallResNet(4, 8, 0.5, 10), torch.randn(8, 3, 32, 32)
    model(images).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("name", "values"),
    [("h_1", [0, True]), ("h_2", [2.0, -1]), ("num_classes", [0, None]), ("p_drop", [1.0, -0.1, float("nan"), "0.1"])],
)
def test_bad_arguments_are_named(name: str, values: list) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} is"):
            SmallResNet(**{"h_1": 4, "h_2": 8, "p_drop": 0.1, "num_classes": 10, name: value})
