"""What trials share: CPUs, GPUs and images."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune import TuneError
from ray.tune.execution import class_cache

from data import Dataset, InputError, save_dataset
from search.files import explain_failure
from search.settings import Settings

# Tune restarts a trial whose process has died. Count one that Ray kills when memory runs low as such, too.
OutOfMemoryError.__bases__, OutOfMemoryError._preempted = (RayActorError,), False  # type: ignore[attr-defined]

# Tune gives its workers an environment for PyTorch Lightning, with which Ray starts new ones instead of the warm ones.
class_cache.DEFAULT_ENV_VARS.clear()


def own_node_lives() -> bool:
    """Return whether Ray considers its node on this machine alive."""
    here = ray.get_runtime_context().get_node_id()
    return any(node["Alive"] for node in ray.nodes() if node["NodeID"] == here)


def machines() -> list[tuple[int, int]]:
    """Return how many CPUs and GPUs Ray has on each machine."""
    found = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in found]


def share_resources(settings: Settings, num_trials: int) -> tuple[dict[str, float], int, str]:
    """Share Ray's CPUs and GPUs among the trials that run at once; raise InputError if a trial asks for too much.

    Returns the resources of a trial (one GPU if there are any, and an equal share of the CPUs), how many trials run at
    once, and a line of text on both.
    """
    found = machines()
    gpus = max(g for _, g in found)
    gpu = min(1, gpus) if settings.gpus_per_trial is None else settings.gpus_per_trial
    cpus = max((c for c, g in found if g >= gpu), default=0)
    per_gpu = int(1 / gpu) if 0 < gpu < 1 else 1  # each fraction is of one GPU

    def places(cpu: int) -> int:
        """Return how many trials with so many CPUs fit, each on one machine."""
        return sum(min(c // cpu, int(g * per_gpu // max(1, gpu)) if gpu else c) for c, g in found)

    at_once = min(num_trials, places(1))
    cpu = settings.cpus_per_trial or next((n for n in range(cpus, 0, -1) if places(n) >= at_once), 1)
    for key, asked, available in (("gpus", gpu, gpus), ("cpus", cpu, cpus)):
        if asked > available:
            where = " on one machine" if len(found) > 1 else ""
            raise InputError(f"--{key}-per-trial {asked:g} exceeds the {available} available{where}; use at most that")
    at_once, (all_cpus, all_gpus) = min(at_once, places(cpu)), map(sum, zip(*found, strict=True))
    return {"cpu": cpu, "gpu": gpu}, at_once, f"{at_once * cpu}/{all_cpus} CPUs, {at_once * gpu:g}/{all_gpus} GPUs"


@contextlib.contextmanager
def temporary_folder(search_folder: Path, dataset: Dataset) -> Iterator[tuple[Path, Path]]:
    """Make a folder for Tune's own files, with the images in a file that all trials map; yield both paths.

    Raises OSError, with Tune's reason, if Tune fails in the block.
    """
    with tempfile.TemporaryDirectory(prefix=".ray_", dir=search_folder, ignore_cleanup_errors=True) as folder:
        # Not in Ray's object store: if Ray dies, this process would crash before it prints how to resume.
        images = Path(folder, "images.pt")
        with explain_failure(images):
            save_dataset(dataset, images)
        try:
            yield Path(folder), images
        except TuneError as error:  # for example, a full disk; its text is a traceback
            raise OSError(str(error).splitlines()[-1]) from error
