"""Starting and stopping Ray, and giving the trials code, images, CPUs and GPUs."""

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray
import torch

from data import Dataset, InputError, save_dataset, usable_cpus
from search.settings import Settings, cluster_address

CODE = Path(__file__).resolve().parents[1]
LONGEST_TEMP_DIR = 40  # bytes; the paths of Ray's sockets below it are limited to 107
# Ray's messages that the search replaces with its own.
LOGGERS = (
    "ray.tune.tune",
    "ray.tune.analysis.experiment_analysis",
    "ray._private.authentication.authentication_token_setup",
)
# A worker takes its next trial only once the thread of its previous one has ended; Tune's limit of 2 s is too short.
WORKER_ENVIRONMENT = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": os.environ.get("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")}
REPEATED_MESSAGES = ("Trials did not complete", "Token authentication", "Failed to fetch metrics")


@contextlib.contextmanager
def running_ray() -> Iterator[None]:
    """Start Ray, or join the cluster at RAY_ADDRESS, for the duration of the block.

    A Ray that this process has already started must have this program's code. Raises InputError if Ray cannot be
    started or joined.
    """
    if ray.is_initialized():
        yield
        return
    for name in LOGGERS:
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(REPEATED_MESSAGES))
    # Trials get a copy of the code: from the working directory they might import another train.py, or none.
    packages = {path.parent.name for path in CODE.glob("*/__init__.py")}
    others = [f"/{path.name}" for path in CODE.iterdir() if path.suffix != ".py" and path.name not in packages]
    address, handler = cluster_address(), signal.getsignal(signal.SIGTERM)
    try:
        if address and (parts := re.fullmatch(r"\[?([^/]+?)\]?:(\d+)", address)):
            # Ray would wait for minutes if nothing listens there.
            socket.create_connection((parts[1], int(parts[2])), timeout=5).close()
        ray.init(
            **({"address": address} if address else local_options()),
            runtime_env={"working_dir": str(CODE), "excludes": others, "env_vars": WORKER_ENVIRONMENT},
            log_to_driver=False,
            logging_level=logging.WARNING,
            include_dashboard=False,
        )
    except SystemExit:  # from the handler of SIGTERM that Ray sets as it starts
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
    except (OSError, OverflowError, ValueError) as error:
        if address:
            raise InputError(
                f"no Ray cluster answers at RAY_ADDRESS {address!r}; start one there, or unset it"
            ) from error
        raise InputError(f"Ray cannot start ({str(error).splitlines()[0]}); see the Ray documentation") from error
    with contextlib.suppress(ValueError):  # not in the main thread, where ray.init replaces it
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


def local_options() -> dict:
    """Return the arguments of ray.init that start a local Ray."""
    if "RAY_AUTH_MODE" not in os.environ:
        # Otherwise Ray writes a token into the home folder, which a container user may lack.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(folder)) > LONGEST_TEMP_DIR:
        folder = "/tmp"
    # Ray counts GPUs that torch cannot use (a Mac's), and finds none without NVIDIA's management library.
    counts = {"num_cpus": usable_cpus(), "num_gpus": torch.cuda.device_count()}
    return {"address": "local", **counts, "_temp_dir": str(Path(folder, "ray"))}


def own_node_lives() -> bool:
    """Return whether Ray considers its node on this machine alive."""
    here = ray.get_runtime_context().get_node_id()
    return any(node["Alive"] for node in ray.nodes() if node["NodeID"] == here)


def share_resources(settings: Settings, num_trials: int) -> tuple[dict[str, float], int, str]:
    """Share Ray's CPUs and GPUs among the trials that run at once; raise InputError if a trial asks for too much.

    Returns the resources of a trial (one GPU if there are any, and an equal share of the CPUs), how many trials run at
    once, and a line of text on both.
    """
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
    gpu = settings.gpus_per_trial
    if gpu is None:
        gpu = min(1, gpus)
    at_once = min(num_trials, int(gpus / gpu) if gpu else cpus)
    cpu = settings.cpus_per_trial or max(1, cpus // max(1, at_once))
    for key, asked, available in (("cpus", cpu, cpus), ("gpus", gpu, gpus)):
        if asked > available:
            raise InputError(f"--{key}-per-trial {asked:g} exceeds the {available} available; use at most that")
    at_once = min(at_once, cpus // cpu)
    return {"cpu": cpu, "gpu": gpu}, at_once, f"{at_once * cpu}/{cpus} CPUs, {at_once * gpu:g}/{gpus} GPUs"


@contextlib.contextmanager
def temporary_folder(search_folder: Path, dataset: Dataset) -> Iterator[tuple[Path, Path]]:
    """Make a folder for Tune's own files, with the images in a file that all trials map; yield both paths."""
    for path in search_folder.glob(".ray_*"):  # left by a killed process
        shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".ray_", dir=search_folder, ignore_cleanup_errors=True) as folder:
        # Not in Ray's object store: if Ray dies, this process would crash before it prints how to resume.
        images = Path(folder, "images.pt")
        save_dataset(dataset, images)
        yield Path(folder), images
