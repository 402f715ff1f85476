import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import SmallResNet


def test_model_has_the_size_that_its_docstring_names() -> None:
    for (h_1, h_2), parameters, flops in (((64, 512), 5.2e6, 0.42e9), ((128, 1024), 20.5e6, 1.51e9)):
        model = SmallResNet(h_1, h_2, 0.1)
        with FlopCounterMode(display=False) as counter:
            assert model(torch.randn(1, 3, 32, 32)).shape == (1, 100)
        assert counter.get_total_flops() == pytest.approx(flops, rel=0.01)
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.01)


def test_every_parameter_learns_dropout_ends_with_training_and_bad_widths_are_named() -> None:
    model, images = SmallResNet(1, 7, 0.5, 10), torch.randn(8, 3, 32, 32)
    model(images).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))
    for name, value in (
        ("h_1", 0),
        ("h_1", True),
        ("h_2", 2.0),
        ("num_classes", None),
        ("p_drop", 1.0),
        ("p_drop", ""),
    ):
        with pytest.raises(ValueError, match=f"^{name} is"):
            SmallResNet(**{"h_1": 4, "h_2": 8, "p_drop": 0.1, "num_classes": 10, name: value})
