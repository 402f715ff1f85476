"""Ray's start and end, in a thread: each waits for seconds, in which the search imports torch, reads images and tests.

Imports neither torch nor the modules that do, so that Ray can start before them.
"""

import logging
import os
import resource
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray._private.node import Node

from search import cluster_address
from search.console import result_of
from search.settings import Settings

CODE = Path(__file__).resolve().parents[1]
LONGEST_TEMP_DIR = 30  # bytes; the paths of Ray's sockets below it are limited to 107
# Below these limits (open files; threads, and more per CPU), Ray hung or crashed on two cores.
FEWEST_FILES, FEWEST_THREADS, THREADS_PER_CPU = 80, 200, 25
WARM = ("search.trial", "torch._dynamo")  # what a worker imports before it has a trial; optimizers need the second
# Programs of a local Ray for its dashboard, for autoscaling and for showing what workers print. For nothing they would
# take 1.6 s of a core, 0.25 GB, and a second at the start and at the end.
UNUSED = ("start_api_server", "start_monitor", "start_log_monitor")
MAX_WARM = 16  # maximum number of workers that do: each takes 4 s of a core, and 0.3 GB
TRIALS_PER_GPU = 2  # by default, at most
DEVICES = ("nvidia*", "nvhost*", "kfd", "dxg")  # in /dev: what a GPU that torch can use has at least one of
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # hold the quotas of containers and jobs
# Ray's messages that the search replaces with its own, or that are about files that nothing here needs.
HIDDEN = ("Trials did", "Token auth", "Failed to fetch", "Caught exception", "Saving experiment", "Experiment state")
NO_HANDLER = "SIGTERM handler is not set"  # another one, as Ray starts in a thread


class RayThread(threading.Thread):
    """Starts Ray, or joins the cluster at RAY_ADDRESS, and shuts it down once `over` is set; `files` removes its files.

    Linux ends Ray's processes when the thread that started them ends, so this one lives as long as they should.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(name="starts Ray", daemon=True)
        self.settings, self.started, self.over, self.files = settings, Future(), threading.Event(), ExitStack()
        self.start()

    def run(self) -> None:
        try:
            with started_ray(self.settings, self.files):
                self.started.set_result(None)
                self.over.wait()
        except BaseException as error:
            if not self.started.done():
                self.started.set_exception(error)


_current: RayThread | None = None


@contextmanager
def running_ray(settings: Settings) -> Iterator[None]:
    """Have Ray started in the background (see wait_for_ray), and stopped at the end of the block.

    In such a block, or if this process has started a Ray itself, which must have this program's code, do nothing.
    """
    global _current
    if _current or ray.is_initialized():
        yield
        return
    _current = RayThread(settings)
    try:
        yield
    except ConnectionError:  # Ray died: keep its files, as its logs may say why
        _current.files.pop_all()
        raise
    finally:
        stop_ray()
        if _current.started.done():
            _current.join()
        while found := ray_processes():  # Ray is still starting, which may take minutes if a signal has ended some
            kill(found)
        _current.files.close()
        _current = None


def wait_for_ray() -> None:
    """Wait until Ray has started; raise InputError if it cannot be started or joined."""
    if _current:
        result_of(_current.started)
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # Ray has installed one that prints a stack


def stop_ray() -> None:
    """Let Ray shut down in the background, if it was started there."""
    if _current:
        _current.over.set()


@contextmanager
def started_ray(settings: Settings, files: ExitStack) -> Iterator[None]:
    """Start Ray, or join the cluster at RAY_ADDRESS, and shut it down after the block; then `files` removes its files.

    Raises InputError if it cannot be started or joined.
    """
    for handler in logging.getLogger("ray").handlers:
        handler.addFilter(lambda record: not record.getMessage().startswith((*HIDDEN, NO_HANDLER)))
    check_limits()
    address = cluster_address()
    try:
        where = urlsplit(f"//{address or ''}")
        if where.port:  # Ray would wait for minutes if nothing listens there
            socket.create_connection((where.hostname, where.port), timeout=5).close()
        with ExitStack() as starting:
            folder = Path(tempfile.mkdtemp(prefix="ray", dir=parent_of_temp_dir()))
            (starting if address else files).callback(shutil.rmtree, folder, ignore_errors=True)
            (code := folder / "code").mkdir()
            copy_code(code)
            options: dict[str, Any]
            if address:
                options = {"address": address, "runtime_env": {"working_dir": str(code)}}
            else:  # workers whose environment differs from Ray's own would not be warm
                starting.enter_context(python_path(code))
                options = local_options(settings) | {"_temp_dir": str(folder)}
            ray.init(**options, log_to_driver=False, logging_level=logging.WARNING, include_dashboard=False)
    except Exception as error:  # Ray raises exceptions of many types
        reason = str(error).splitlines()[0].rstrip(".")
        sentence = f"Ray cannot start ({reason}); see the Ray documentation"
        if address:
            sentence = f"no Ray cluster answers at RAY_ADDRESS {address!r}; start one there, or unset it"
        raise input_error(sentence) from error
    try:
        yield
    finally:
        found = ray_processes()
        ray.shutdown()
        kill(found)  # a worker that is importing would take seconds to notice


def ray_processes() -> list:
    """Return Ray's processes that this one has started, and theirs."""
    import psutil  # a part of Ray

    parents = [child for child in psutil.Process().children() if child.name() in ("gcs_server", "raylet")]
    found = list(parents)
    for parent in parents:
        with suppress(psutil.NoSuchProcess):
            found += parent.children(recursive=True)
    return found


def kill(processes: list) -> None:
    """Kill processes, unless they have ended, and wait a second for their ends."""
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=1)


def input_error(sentence: str) -> Exception:
    """Return an InputError, whose module imports torch."""
    from data import InputError

    return InputError(sentence)


def copy_code(target: Path) -> None:
    """Copy this project's modules and packages, for the trials, to a folder.

    In the working directory, trials might find another train.py, or none. Unlike the project's folder, the copy has no
    data and no .gitignore, which Ray would obey.
    """
    for path in CODE.glob("*.py"):
        shutil.copy(path, target)
    for path in CODE.glob("*/__init__.py"):
        shutil.copytree(path.parent, target / path.parent.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))


@contextmanager
def python_path(folder: Path) -> Iterator[None]:
    """Let processes that are started in the block, and their children, find modules in a folder first."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), before] if before else [str(folder)])
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ |= {"PYTHONPATH": before} if before else {}


def check_limits() -> None:
    """Refuse limits of this process with which Ray would hang or crash."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # the maximum, to which Ray raises the limit
    threads = resource.getrlimit(resource.RLIMIT_NPROC)[0] if os.geteuid() else resource.RLIM_INFINITY  # none for root
    needed = FEWEST_THREADS + THREADS_PER_CPU * usable_cpus()
    for thread in Path("/proc").glob("[0-9]*/task/[0-9]*"):  # those of this user's other programs count, too
        with suppress(OSError):  # it has ended
            needed += thread.stat().st_uid == os.geteuid()
    for letter, limit, fewest in (("n", files, FEWEST_FILES), ("u", threads, needed)):
        if limit != resource.RLIM_INFINITY and limit < fewest:
            raise input_error(f"ulimit -{letter} {limit} is too low for Ray; raise it to at least {fewest}")


def parent_of_temp_dir() -> Path:
    """Return the folder in which Ray's temporary folder is made."""
    parent = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    if len(os.fsencode(parent)) > LONGEST_TEMP_DIR:
        parent = Path("/tmp")
    parent.mkdir(parents=True, exist_ok=True)
    return parent


def local_options(settings: Settings) -> dict[str, Any]:
    """Return the arguments of ray.init that start a local Ray, whose workers are warm before they have a trial."""
    # Otherwise Ray writes a token into the home folder, which a container user may lack.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cpus, gpus, per_trial = usable_cpus(), usable_gpus(settings), settings.gpus_per_trial
    # Ray starts a worker per CPU, and trials on GPUs hardly need CPUs. What a resumed search needs is not known yet.
    if gpus and not (settings.cpus_per_trial or settings.resume or settings.or_resume):
        cpus = min(cpus, gpus * max(TRIALS_PER_GPU, int(1 / per_trial) if per_trial else 0))
    for name in UNUSED:
        setattr(Node, name, lambda self, **options: None)
    options: dict[str, Any] = {"address": "local", "num_cpus": cpus, "num_gpus": gpus}
    return options | ({"_system_config": {"preload_python_modules": WARM}} if cpus <= MAX_WARM else {})


def usable_gpus(settings: Settings) -> int:
    """Return how many GPUs torch can use here; Ray may count others (a Mac's), or none without NVIDIA's library.

    Asks torch, whose import takes seconds, only if there may be any.
    """
    if settings.gpus_per_trial == 0 or not any(any(Path("/dev").glob(name)) for name in DEVICES):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def usable_cpus() -> int:
    """Return how many CPUs this process may use, by its affinity (taskset, SLURM) and the quotas of its cgroups."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    paths = {Path()}  # a container sees its own cgroup as the root
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            path = Path(line.split(":", 2)[2].lstrip("/"))
            paths |= {path, *path.parents}
    for folder in (root / path for root in (CGROUPS, CGROUPS / "cpu", CGROUPS / "cpu,cpuacct") for path in paths):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # of cgroup v2, and of v1
            with suppress(OSError, ValueError):  # no such file; no quota ("max")
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                if quota > 0:
                    count = min(count, max(1, quota // period))
    return count
