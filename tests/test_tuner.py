import pytest
import ray

from data import InputError
from search.settings import Settings
from search.tuner import share_resources


def test_resources_are_shared_equally_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, gpus, num_trials, flags, shared in (
        (2, 0, 12, {}, (1, 0, 2, "2/2 CPUs, 0/0 GPUs")), (16, 0, 4, {}, (4, 0, 4, "16/16 CPUs, 0/0 GPUs")),
        (16, 1, 12, {}, (16, 1, 1, "16/16 CPUs, 1/1 GPUs")), (4, 8, 12, {}, (1, 1, 4, "4/4 CPUs, 4/8 GPUs")),
        (16, 0, 4, {"cpus_per_trial": 9}, (9, 0, 1, "9/16 CPUs, 0/0 GPUs")),
        (16, 2, 12, {"gpus_per_trial": 0.5}, (4, 0.5, 4, "16/16 CPUs, 2/2 GPUs")),
    ):  # fmt: skip
        monkeypatch.setattr(ray, "cluster_resources", lambda total={"CPU": cpus, "GPU": gpus}: total)
        assert share_resources(Settings(**flags), num_trials) == ({"cpu": shared[0], "gpu": shared[1]}, *shared[2:])
    with pytest.raises(InputError, match="--gpus-per-trial 3 exceeds the 2 available; use at most that"):
        share_resources(Settings(gpus_per_trial=3), 2)
