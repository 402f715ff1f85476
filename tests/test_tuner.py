from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError

from data import InputError
from search import tuner
from search.settings import Settings
from search.tuner import share_resources
from tests.helpers import CONFIG


def test_resources_are_shared_equally_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for machines, num_trials, flags, cpu, gpu, *rest in (
        ([(2, 0)], 12, {}, 1, 0, 2, "2/2 CPUs, 0/0 GPUs"), ([(16, 0)], 4, {}, 4, 0, 4, "16/16 CPUs, 0/0 GPUs"),
        ([(16, 1)], 12, {}, 16, 1, 1, "16/16 CPUs, 1/1 GPUs"), ([(4, 8)], 12, {}, 1, 1, 4, "4/4 CPUs, 4/8 GPUs"),
        ([(16, 0)], 4, {"cpus_per_trial": 9}, 9, 0, 1, "9/16 CPUs, 0/0 GPUs"),
        ([(16, 2)], 12, {"gpus_per_trial": 0.5}, 4, 0.5, 4, "16/16 CPUs, 2/2 GPUs"),
        # A trial runs on one machine, and a fraction of a GPU is of one GPU.
        ([(16, 2)], 12, {"gpus_per_trial": 0.4}, 4, 0.4, 4, "16/16 CPUs, 1.6/2 GPUs"),
        ([(16, 4)], 12, {"gpus_per_trial": 0.6}, 4, 0.6, 4, "16/16 CPUs, 2.4/4 GPUs"),
        ([(4, 0), (4, 0)], 1, {}, 4, 0, 1, "4/8 CPUs, 0/0 GPUs"),
        ([(0, 0), (8, 1), (64, 1)], 12, {}, 8, 1, 2, "16/72 CPUs, 2/2 GPUs"),
        ([(3, 0), (3, 0)], 9, {"cpus_per_trial": 2}, 2, 0, 2, "4/6 CPUs, 0/0 GPUs"),
        ([(8, 4), (8, 4)], 9, {"gpus_per_trial": 2.0}, 4, 2, 4, "16/16 CPUs, 8/8 GPUs"),
    ):  # fmt: skip
        monkeypatch.setattr(tuner, "machines", lambda found=machines: found)
        assert share_resources(Settings(**flags), [{}] * num_trials) == ({"cpu": cpu, "gpu": gpu}, *rest)
    monkeypatch.setattr(tuner, "free_gpu_memory", lambda: 24e9)
    for config, num_trials, gpu in ((CONFIG, 12, 0.5), (CONFIG | {"h_2": 4096}, 12, 1), (CONFIG, 2, 1)):
        monkeypatch.setattr(tuner, "machines", lambda: [(8, 2)])
        assert share_resources(Settings(), [config] * num_trials)[0]["gpu"] == gpu
    for machines, key, asked, refusal in (
        ([(4, 2)], "gpus_per_trial", 3, "--gpus-per-trial 3 exceeds the 2 available; use at most that"),
        ([(4, 0), (2, 2)], "cpus_per_trial", 3, "--cpus-per-trial 3 exceeds the 2 available on one machine; use"),
    ):
        monkeypatch.setattr(tuner, "machines", lambda found=machines: found)
        with pytest.raises(InputError, match=refusal):
            share_resources(Settings(**{key: asked}), [{}] * 2)


def test_gpus_are_asked_for_their_free_memory_and_whether_programs_may_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tuner.free_gpu_memory() == 0
    for printed, free in (
        ("Default, 1000", 1000),
        ("Default, 9\nDefault, 7", 7),
        ("Exclusive_Process, 9", 0),
        ("?", 0),
    ):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{printed}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert tuner.free_gpu_memory() == free * 2**20


def test_trial_that_ray_kills_for_its_memory_counts_as_one_that_died() -> None:
    error = OutOfMemoryError("1 worker(s) were killed")
    assert (isinstance(error, RayActorError), error.preempted, str(error)) == (True, False, "1 worker(s) were killed")
