import pytest
from ray.exceptions import OutOfMemoryError, RayActorError

from data import InputError
from search import tuner
from search.settings import Settings
from search.tuner import share_resources


def test_resources_are_shared_equally_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for machines, num_trials, flags, cpu, gpu, *rest in (
        ([(2, 0)], 12, {}, 1, 0, 2, "2/2 CPUs, 0/0 GPUs"), ([(16, 0)], 4, {}, 4, 0, 4, "16/16 CPUs, 0/0 GPUs"),
        ([(16, 1)], 12, {}, 16, 1, 1, "16/16 CPUs, 1/1 GPUs"), ([(4, 8)], 12, {}, 1, 1, 4, "4/4 CPUs, 4/8 GPUs"),
        ([(16, 0)], 4, {"cpus_per_trial": 9}, 9, 0, 1, "9/16 CPUs, 0/0 GPUs"),
        ([(16, 2)], 12, {"gpus_per_trial": 0.5}, 4, 0.5, 4, "16/16 CPUs, 2/2 GPUs"),
        # A trial runs on one machine, and a fraction of a GPU is of one GPU.
        ([(16, 2)], 12, {"gpus_per_trial": 0.4}, 4, 0.4, 4, "16/16 CPUs, 1.6/2 GPUs"),
        ([(4, 0), (4, 0)], 1, {}, 4, 0, 1, "4/8 CPUs, 0/0 GPUs"),
        ([(0, 0), (8, 1), (64, 1)], 12, {}, 8, 1, 2, "16/72 CPUs, 2/2 GPUs"),
        ([(3, 0), (3, 0)], 9, {"cpus_per_trial": 2}, 2, 0, 2, "4/6 CPUs, 0/0 GPUs"),
        ([(8, 4), (8, 4)], 9, {"gpus_per_trial": 2.0}, 4, 2, 4, "16/16 CPUs, 8/8 GPUs"),
    ):  # fmt: skip
        monkeypatch.setattr(tuner, "machines", lambda found=machines: found)
        assert share_resources(Settings(**flags), num_trials) == ({"cpu": cpu, "gpu": gpu}, *rest)
    for machines, key, asked, refusal in (
        ([(4, 2)], "gpus_per_trial", 3, "--gpus-per-trial 3 exceeds the 2 available; use at most that"),
        ([(4, 0), (2, 2)], "cpus_per_trial", 3, "--cpus-per-trial 3 exceeds the 2 available on one machine; use"),
    ):
        monkeypatch.setattr(tuner, "machines", lambda found=machines: found)
        with pytest.raises(InputError, match=refusal):
            share_resources(Settings(**{key: asked}), 2)


def test_trial_that_ray_kills_for_its_memory_counts_as_one_that_died() -> None:
    error = OutOfMemoryError("1 worker(s) were killed")
    assert (isinstance(error, RayActorError), error.preempted, str(error)) == (True, False, "1 worker(s) were killed")
