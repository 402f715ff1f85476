"""Ray's life: its start and end, what it may print, and what it gives to a trial."""

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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data import InputError, usable_cpus
from search.command_line import Settings, cluster_address, count_gpus

CODE = Path(__file__).resolve().parents[1]
code_brought: list[str] = []  # copies of it that Ray has been given by this process
LONGEST_TEMP_DIR = 40  # bytes; the paths of Ray's sockets below it may have 107


def is_news(record: logging.LogRecord) -> bool:
    """Filter what Ray logs: what main says itself, in this script's terms, is no news."""
    said = ("Trials did not complete", "Token authentication", "Failed to fetch metrics")
    return not record.getMessage().startswith(said)


@contextlib.contextmanager
def running_ray() -> Iterator[None]:
    """Start Ray, or join the cluster that RAY_ADDRESS names, and leave it as it was found.

    Raises:
        InputError: it cannot be started or joined.
    """
    if ray.is_initialized():
        if ray.get_runtime_context().runtime_env.get("working_dir") not in code_brought:
            raise InputError("Ray is already running, without this program's code; call ray.shutdown() first")
        yield
        return
    for name in (
        "ray.tune.tune",
        "ray.tune.analysis.experiment_analysis",
        "ray._private.authentication.authentication_token_setup",
    ):
        logging.getLogger(name).addFilter(is_news)
    address = cluster_address()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address and (parts := re.fullmatch(r"\[?([^/]+?)\]?:(\d+)", address)):
            # If nobody listens there, Ray would wait for minutes.
            socket.create_connection((parts[1], int(parts[2])), timeout=5).close()
        ray.init(
            **({"address": address} if address else options_of_own()),
            runtime_env=code_of_trials(),
            log_to_driver=False,
            logging_level=logging.WARNING,
            include_dashboard=False,
        )
        code_brought.append(ray.get_runtime_context().runtime_env["working_dir"])
    except SystemExit:  # by the handler of SIGTERM that Ray sets as it starts
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
    except (OSError, OverflowError, ValueError) as error:
        if address:
            raise InputError(
                f"no Ray cluster answers at RAY_ADDRESS {address!r}; start one there, or unset it"
            ) from error
        raise InputError(f"Ray cannot be started: {str(error).splitlines()[0]}") from error
    with contextlib.suppress(ValueError):  # not the main thread; in that, ray.init replaced it
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


def code_of_trials() -> dict:
    """Return the runtime environment that gives each trial a copy of the code beside hparam_search.py.

    Without it, a trial would import from the working directory: another train.py, or none.
    """
    packages = {path.parent.name for path in CODE.glob("*/__init__.py")}
    others = [path.name for path in CODE.iterdir() if path.suffix != ".py" and path.name not in packages]
    return {"working_dir": str(CODE), "excludes": [f"/{name}" for name in others]}


def options_of_own() -> dict:
    """Return the arguments of ray.init for a Ray of this search's own.

    Raises:
        InputError: no folder suits its sockets.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        # Otherwise Ray writes a token into the home folder, which a container user may lack.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    wanted = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    for place in (wanted, "/tmp"):
        if len(os.fsencode(place)) <= LONGEST_TEMP_DIR and os.access(place, os.W_OK | os.X_OK):
            # Ray counts GPUs that torch cannot use (a Mac's), and finds none without NVIDIA's management library.
            counts = {"num_cpus": usable_cpus(), "num_gpus": count_gpus()}
            return {"address": "local", **counts, "_temp_dir": str(Path(place, "ray"))}
    raise InputError(
        f"Ray cannot put its sockets into {wanted}; set TMPDIR to a writable folder with a path of at most "
        f"{LONGEST_TEMP_DIR} bytes"
    )


@contextlib.contextmanager
def folder_for_ray(search_folder: Path) -> Iterator[Path]:
    """Make a folder for files needed only while a search runs; --resume never reads it."""
    for path in search_folder.glob(".ray_*"):  # of a process that was killed
        shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".ray_", dir=search_folder, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def own_node_lives() -> bool:
    """Return whether Ray considers its node on this machine alive."""
    here = ray.get_runtime_context().get_node_id()
    return any(node["Alive"] for node in ray.nodes() if node["NodeID"] == here)


def check_all_nodes_see(folder: Path) -> None:
    """Refuse a folder that a node of the cluster does not see: trials write there, wherever they run.

    Raises:
        InputError: naming the node.
    """

    def sees(path: str) -> bool:  # in here, it travels whole: a node need not have this file yet
        return Path(path).is_dir()

    here, asked = ray.get_runtime_context().get_node_id(), []  # of one machine, several nodes have the same name
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] != here:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, scheduling_strategy=there)(sees)
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            asked.append((name, task.remote(str(folder))))
    for name, answer in asked:
        with contextlib.suppress(ray.exceptions.RayError):  # of a node that has died meanwhile
            if not ray.get(answer):
                raise InputError(
                    f"the node {name} does not see {folder}: give an --output-dir on a disk that all nodes share"
                )


def share_resources(settings: Settings, num_trials: int) -> tuple[dict[str, float], int, str]:
    """Share Ray's CPUs and GPUs among the trials that run at once.

    Returns:
        The resources of a trial: a GPU each where there are any, and the CPUs shared so that all are busy; how many
        trials run at once; and their usage, as a line to print.
    """
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
    gpu = settings.gpus_per_trial
    if gpu is None:
        gpu = 1 if gpus else 0
    at_once = min(num_trials, int(gpus / gpu) if gpu else cpus)
    cpu = settings.cpus_per_trial or max(1, cpus // max(1, at_once))
    at_once = min(at_once, cpus // cpu)
    return {"cpu": cpu, "gpu": gpu}, at_once, f"{at_once * cpu}/{cpus} CPUs, {at_once * gpu:g}/{gpus} GPUs"
