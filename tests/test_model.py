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
