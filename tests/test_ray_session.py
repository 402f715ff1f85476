import pytest
import ray

from search.command_line import Settings
from search.ray_session import options_of_own, share_resources


@pytest.mark.parametrize(
    ("machine", "flags", "num_trials", "cpu", "gpu", "at_once", "usage"),
    [
        ({"CPU": 2}, {}, 12, 1, 0, 2, "2/2 CPUs, 0/0 GPUs"),
        ({"CPU": 16}, {}, 4, 4, 0, 4, "16/16 CPUs, 0/0 GPUs"),
        ({"CPU": 16}, {"cpus_per_trial": 8}, 4, 8, 0, 2, "16/16 CPUs, 0/0 GPUs"),
        ({"CPU": 16, "GPU": 1}, {}, 12, 16, 1, 1, "16/16 CPUs, 1/1 GPUs"),
        ({"CPU": 16, "GPU": 2}, {"gpus_per_trial": 0.5}, 12, 4, 0.5, 4, "16/16 CPUs, 2/2 GPUs"),
        ({"CPU": 16, "GPU": 4}, {"gpus_per_trial": 2}, 12, 8, 2, 2, "16/16 CPUs, 4/4 GPUs"),
        ({"CPU": 4, "GPU": 8}, {}, 12, 1, 1, 4, "4/4 CPUs, 4/8 GPUs"),
        ({"CPU": 16, "GPU": 1}, {"gpus_per_trial": 0}, 2, 8, 0, 2, "16/16 CPUs, 0/1 GPUs"),
    ],
)
def test_resources_are_shared(
    machine: dict,
    flags: dict,
    num_trials: int,
    cpu: int,
    gpu: float,
    at_once: int,
    usage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: machine)
    assert share_resources(Settings(**flags), num_trials) == ({"cpu": cpu, "gpu": gpu}, at_once, usage)


def test_ray_is_told_of_the_gpus_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (0, 3):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert options_of_own()["num_gpus"] == count
