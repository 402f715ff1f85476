"""Ray's life: its start and end, what it may print, and what it gives to a trial."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data import InputError
from search.command_line import Settings

CODE = Path(__file__).resolve().parents[1]
CODE_OF_A_TRIAL = ("data.py", "model.py", "train.py", "search")


def is_news(record: logging.LogRecord) -> bool:
    """Filter what Ray logs: what main says itself, in this script's terms, is no news."""
    said = (
        "Stop signal received",
        "Trials did not complete",
        "Experiment has been interrupted",
        "Token authentication",
        "Failed to fetch metrics",
    )
    return not record.getMessage().startswith(said)


@contextlib.contextmanager
def running_ray() -> Iterator[None]:
    """Start Ray, or join the cluster that RAY_ADDRESS names, and leave it as it was found."""
    if ray.is_initialized():
        yield
        return
    for name in (
        "ray.tune.tune",
        "ray.tune.analysis.experiment_analysis",
        "ray._private.authentication.authentication_token_setup",
    ):
        logging.getLogger(name).addFilter(is_news)
    # Not Ray's own default, which waits for minutes for a cluster of which but a stale file is left.
    address = os.environ.get("RAY_ADDRESS", "local")
    environment = None
    if address != "local":  # the nodes of a cluster need not have this program: Ray brings what trials run
        others = [f"/{path.name}" for path in CODE.iterdir() if path.name not in CODE_OF_A_TRIAL]
        environment = {"working_dir": str(CODE), "excludes": others}
    try:
        ray.init(
            address,
            runtime_env=environment,
            log_to_driver=False,
            logging_level=logging.WARNING,
            include_dashboard=False,
        )
    except ConnectionError as error:
        raise InputError(f"no Ray cluster answers at RAY_ADDRESS {address}: start it, or unset RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def folder_for_ray(search_folder: Path) -> Iterator[Path]:
    """Make a folder for what Ray writes while a search runs; nothing is ever read from it, and it goes in the end."""
    for path in search_folder.glob(".ray_*"):  # of a process that was killed
        shutil.rmtree(path, ignore_errors=True)
    place = search_folder if "RAY_ADDRESS" in os.environ else None  # all nodes of a cluster must see it
    with tempfile.TemporaryDirectory(prefix=".ray_", dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


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
