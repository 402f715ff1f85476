"""Starting and stopping Ray, and giving the trials code, images, CPUs and GPUs."""

import contextlib
import logging
import os
import resource
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune import TuneError

from data import Dataset, InputError, save_dataset, usable_cpus
from search import cluster_address
from search.files import explain_failure
from search.settings import Settings

CODE = Path(__file__).resolve().parents[1]
LONGEST_TEMP_DIR = 30  # bytes; the paths of Ray's sockets below it are limited to 107
# Below these limits (open files; threads, and more per CPU), Ray hung or crashed on two cores.
FEWEST_FILES, FEWEST_THREADS, THREADS_PER_CPU = 80, 200, 25
# Ray's messages that the search replaces with its own, or that are about files that nothing here needs.
HIDDEN = ("Trials did", "Token auth", "Failed to fetch", "Caught exception", "Saving experiment", "Experiment state")
# Tune restarts a trial whose process has died. Count one that Ray kills when memory runs low as such, too.
OutOfMemoryError.__bases__, OutOfMemoryError._preempted = (RayActorError,), False  # type: ignore[attr-defined]


@contextlib.contextmanager
def running_ray(settings: Settings) -> Iterator[None]:
    """Start Ray, or join the cluster at RAY_ADDRESS, for the duration of the block.

    A Ray that this process has already started must have this program's code. Raises InputError if Ray cannot be
    started or joined.
    """
    if ray.is_initialized():
        yield
        return
    for handler in logging.getLogger("ray").handlers:
        handler.addFilter(lambda record: not record.getMessage().startswith(HIDDEN))
    check_limits()
    address, on_sigterm = cluster_address(), signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as cleanup:
        try:
            options = {"address": address} if address else local_options(settings)
            cleanup.callback(shutil.rmtree, options.get("_temp_dir", ""), ignore_errors=True)
            where = urlsplit(f"//{address or ''}")
            if where.port:  # Ray would wait for minutes if nothing listens there
                socket.create_connection((where.hostname, where.port), timeout=5).close()
            with tempfile.TemporaryDirectory() as code:
                copy_code(Path(code))
                ray.init(
                    **options,
                    runtime_env={"working_dir": code},
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    include_dashboard=False,
                )
        except SystemExit:  # from the handler of SIGTERM that Ray sets as it starts
            raise SystemExit(128 + signal.SIGTERM) from None
        except Exception as error:  # Ray raises exceptions of many types
            reason = str(error).splitlines()[0].rstrip(".")
            sentence = f"Ray cannot start ({reason}); see the Ray documentation"
            if address:
                sentence = f"no Ray cluster answers at RAY_ADDRESS {address!r}; start one there, or unset it"
            raise InputError(sentence) from error
        finally:
            with contextlib.suppress(ValueError):  # not in the main thread, where Ray replaces it
                signal.signal(signal.SIGTERM, on_sigterm)
        try:
            yield
        except ConnectionError:  # Ray died: keep its folder, as its logs may say why
            cleanup.pop_all()
            raise
        finally:
            ray.shutdown()


def copy_code(target: Path) -> None:
    """Copy this project's modules and packages, for the trials, to a folder.

    In the working directory, trials might find another train.py, or none. Unlike the project's folder, the copy has no
    data and no .gitignore, which Ray would obey.
    """
    for path in CODE.glob("*.py"):
        shutil.copy(path, target)
    for path in CODE.glob("*/__init__.py"):
        shutil.copytree(path.parent, target / path.parent.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))


def check_limits() -> None:
    """Refuse limits of this process with which Ray would hang or crash."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # the maximum, to which Ray raises the limit
    threads = resource.getrlimit(resource.RLIMIT_NPROC)[0] if os.geteuid() else resource.RLIM_INFINITY  # none for root
    needed = FEWEST_THREADS + THREADS_PER_CPU * usable_cpus()
    for thread in Path("/proc").glob("[0-9]*/task/[0-9]*"):  # those of this user's other programs count, too
        with contextlib.suppress(OSError):  # it has ended
            needed += thread.stat().st_uid == os.geteuid()
    for letter, limit, fewest in (("n", files, FEWEST_FILES), ("u", threads, needed)):
        if limit != resource.RLIM_INFINITY and limit < fewest:
            raise InputError(f"ulimit -{letter} {limit} is too low for Ray; raise it to at least {fewest}")


def local_options(settings: Settings) -> dict:
    """Return the arguments of ray.init that start a local Ray with its own temporary folder."""
    # Otherwise Ray writes a token into the home folder, which a container user may lack.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    parent = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    if len(os.fsencode(parent)) > LONGEST_TEMP_DIR:
        parent = Path("/tmp")
    parent.mkdir(parents=True, exist_ok=True)
    # Ray counts GPUs that torch cannot use (a Mac's), and finds none without NVIDIA's management library.
    usable = settings.gpus_per_trial != 0 and torch.cuda.is_available()
    counts = {"num_cpus": usable_cpus(), "num_gpus": torch.cuda.device_count() if usable else 0}
    return {"address": "local", **counts, "_temp_dir": tempfile.mkdtemp(prefix="ray", dir=parent)}


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
