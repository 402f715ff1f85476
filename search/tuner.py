"""What trials share: CPUs, GPUs and images."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune import TuneError
from ray.tune.execution import class_cache

from data import Dataset, InputError, save_dataset
from search import cluster_address
from search.cost import trial_memory
from search.files import explain_failure
from search.ray_runtime import TRIALS_PER_GPU
from search.settings import Settings

AMPLE = 4  # how many times the memory that the trials on a GPU need must be free, for it to have several by default
# Tune restarts a trial whose process has died. Count one that Ray kills when memory runs low as such, too.
OutOfMemoryError.__bases__, OutOfMemoryError._preempted = (RayActorError,), False  # type: ignore[attr-defined]
# Tune gives its workers an environment for PyTorch Lightning, with which Ray starts new ones instead of the warm ones.
class_cache.DEFAULT_ENV_VARS.clear()
if not cluster_address():  # workers inherit the variables that Tune passes on, such as AWS's
    class_cache.ENV_VARS_TO_PROPAGATE.clear()


def own_node_lives() -> bool:
    """Return whether Ray considers its node on this machine alive."""
    here = ray.get_runtime_context().get_node_id()
    return any(node["Alive"] for node in ray.nodes() if node["NodeID"] == here)


def machines() -> list[tuple[int, int]]:
    """Return how many CPUs and GPUs Ray has on each machine."""
    found = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in found]


def free_gpu_memory() -> float:
    """Return the free bytes of this machine's fullest GPU; 0 if unknown, or if only one process may use a GPU."""
    command = ["nvidia-smi", "--query-gpu=compute_mode,memory.free", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        found = [line.split(", ") for line in printed.splitlines()]
        return min(float(mebibytes) * 2**20 * (mode == "Default") for mode, mebibytes in found)
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0.0


def default_share(configs: list[dict], gpus: int) -> float:
    """Return how much of a GPU each trial gets by default: if memory is ample, trials share one to hide their starts.

    This is known only of a local Ray.
    """
    if cluster_address() or not 0 < gpus < len(configs):
        return min(1, gpus)
    free = free_gpu_memory()
    return 1 / TRIALS_PER_GPU if free and free >= AMPLE * TRIALS_PER_GPU * max(map(trial_memory, configs)) else 1


def share_resources(settings: Settings, configs: list[dict]) -> tuple[dict[str, float], int, str]:
    """Share Ray's CPUs and GPUs among the trials of these configs; raise InputError if a trial asks for too much.

    Returns the resources of a trial (by default one GPU or half of one, if there are any, and an equal share of the
    CPUs), how many trials run at once, and a line of text on both.
    """
    found = machines()
    gpus = max(g for _, g in found)
    if (gpu := settings.gpus_per_trial) is None:
        gpu = default_share(configs, sum(g for _, g in found))
    cpus = max((c for c, g in found if g >= gpu), default=0)
    per_gpu = int(1 / gpu) if 0 < gpu < 1 else 1  # each fraction is of one GPU

    def places(cpu: int) -> int:
        """Return how many trials with so many CPUs fit, each on one machine."""
        return sum(min(c // cpu, int(g * per_gpu // max(1, gpu)) if gpu else c) for c, g in found)

    at_once = min(len(configs), places(1))
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
