from pathlib import Path

import pytest

from model import SmallResNet
from search.cost import cheaper, model_cost
from tests.helpers import CONFIG, add, search_in


@pytest.mark.parametrize(("h_1", "h_2"), [(64, 512), (128, 1024)])
def test_cost_is_that_of_a_count_by_hand_and_of_the_docstring(h_1: int, h_2: int) -> None:
    convolutions = [  # channels in and out, height and width of the output
        (3, 64, 32), (64, h_1, 32), (h_1, h_1, 16), (h_1, h_1, 16), (h_1, h_2, 16), (h_2, h_2, 4), (h_2, h_2, 4),
    ]  # fmt: skip
    parameters = sum(9 * one * two + 2 * two for one, two, _ in convolutions) + (h_2 + 1) * 100
    gflop = 2e-9 * (sum(9 * one * two * side**2 for one, two, side in convolutions) + h_2 * 100)
    cost = model_cost(CONFIG | {"h_1": h_1, "h_2": h_2}, 100)
    assert cost == {"parameters": parameters, "gflop_per_image": pytest.approx(gflop)}
    assert all(words in SmallResNet.__doc__ for words in (f" {parameters / 1e6:.1f} M ", f" {gflop:.2f} GFLOP"))


def test_cheaper_trial_is_named_if_one_is_within_a_standard_error_of_the_best(tmp_path: Path) -> None:
    search, big = search_in(tmp_path), {"h_1": 8, "h_2": 16}

    def named() -> str:
        return cheaper(search, search.ranking()[0])

    add(search, 0.9, **big)
    add(search, 0.89, **big, lr=0.02)  # costs as much
    add(search, 0.79)  # √((0.9 · 0.1 + 0.79 · 0.21) / 25) = 0.1012
    add(search, 0.88, h_1=64, h_2=16)
    add(search, 0.899, h_1=1, h_2=1, end=None)  # has not ended
    assert named() == ""
    add(search, 0.82, h_1=8, h_2=15)
    cheapest = add(search, 0.81)  # √((0.9 · 0.1 + 0.81 · 0.19) / 25) = 0.0988
    share = model_cost(CONFIG, 5)["gflop_per_image"] / model_cost(CONFIG | big, 5)["gflop_per_image"]
    about = f"{cheapest} (accuracy 0.8100, {share:.0%} of the FLOPs)"
    assert named() == f"Cheaper, within one standard error of the best: {about}."
    search.images["num_val"] = 250_000
    assert named() == ""
