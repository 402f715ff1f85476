"""Ray's start and end, in a thread: each takes seconds, in which the search imports torch, reads images and tests.

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
import time
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
# Programs of a local Ray for its dashboard, for autoscaling and for showing what workers print. For nothing they would
# take 1.6 s of a core, 0.25 GB, and a second at the start and at the end.
UNUSED = ("start_api_server", "start_monitor", "start_log_monitor")
WARM = ("search.trial", "search.warm")  # what workers import before they have a trial
MAX_WARM = 16  # with more CPUs, and thus workers, none are warm: each takes 3 s of a core, and 0.4 GB
LONGEST_WARM_UP = 30  # seconds
TRIALS_PER_GPU = 2  # by default, at most
DEVICES = ("nvidia*", "nvhost*", "kfd", "dxg")  # in /dev: what a GPU that torch can use has at least one of
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # hold the quotas of containers and jobs
# Ray's messages that the search replaces with its own, or that are about files and handlers that nothing here needs.
HIDDEN = (
    "Trials did",
    "Token auth",
    "Failed to fetch",
    "Caught exception",
    "Saving experiment",
    "Experiment state",
    "SIGTERM handler",
)

_started: Future | None = None  # that of the Ray of running_ray
_over = threading.Event()  # whether that Ray is to end
_warm_folder: Path | None = None  # has a file for each warm worker


@contextmanager
def running_ray(settings: Settings) -> Iterator[None]:
    """Have Ray started by a thread (see wait_for_ray), and stopped at the end of the block.

    In such a block, or if this process has started a Ray itself, which must have this program's code, do nothing.
    """
    global _started
    if _started or ray.is_initialized():
        yield
        return
    _started, files = Future(), ExitStack()
    _over.clear()
    thread = threading.Thread(target=start_and_stop, args=(settings, _started, files), name="Ray", daemon=True)
    thread.start()
    try:
        yield
    except ConnectionError:  # Ray died: keep its files, as its logs may say why
        files.pop_all()
        raise
    finally:
        started, _started = _started, None
        _over.set()
        try:
            if started.done():
                thread.join()
        finally:
            if not cluster_address():
                kill_processes()  # if Ray is still starting: it may wait for minutes for those that a signal has ended
            files.close()


def start_and_stop(settings: Settings, started: Future, files: ExitStack) -> None:
    """Start Ray, and stop it in the same thread, with whose end Linux would end Ray's processes."""
    try:
        with started_ray(settings, files):
            started.set_result(None)
            _over.wait()
    except BaseException as error:
        if not started.done():
            started.set_exception(error)


def wait_for_ray() -> None:
    """Wait until Ray has started; raise InputError if it cannot be started or joined."""
    if _started:
        result_of(_started)
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # Ray has installed one that prints a stack


def wait_for_workers(count: int) -> None:
    """Wait until so many workers of a local Ray are warm; before that, Ray would start others for the trials."""
    end = time.monotonic() + LONGEST_WARM_UP
    while _warm_folder and len(list(_warm_folder.glob("warm_*"))) < count and time.monotonic() < end:
        time.sleep(0.02)


def stop_ray() -> None:
    """Let the Ray of running_ray end in the background."""
    _over.set()


@contextmanager
def started_ray(settings: Settings, files: ExitStack) -> Iterator[None]:
    """Start Ray, or join the cluster at RAY_ADDRESS, and shut it down after the block; then `files` removes its files.

    Raises InputError if it cannot be started or joined.
    """
    global _warm_folder
    for handler in logging.getLogger("ray").handlers:
        handler.addFilter(lambda record: not record.getMessage().startswith(HIDDEN))
    check_limits()
    address = cluster_address()
    try:
        where = urlsplit(f"//{address or ''}")
        if where.port:  # Ray would wait for minutes if nothing listens there
            socket.create_connection((where.hostname, where.port), timeout=5).close()
        with ExitStack() as starting:
            parent = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
            parent = parent if len(os.fsencode(parent)) <= LONGEST_TEMP_DIR else Path("/tmp")
            parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="ray", dir=parent))
            (starting if address else files).callback(shutil.rmtree, folder, ignore_errors=True)
            copy_code(code := folder / "code")
            options: dict[str, Any] = (
                {"address": address} if address else local_options(settings) | {"_temp_dir": str(folder)}
            )
            if "_system_config" not in options:
                options["runtime_env"] = {"working_dir": str(code)}
            else:  # workers whose environment differs from Ray's own would not be warm
                before = os.environ.get("PYTHONPATH", "")
                starting.callback(os.environ.update, PYTHONPATH=before)
                os.environ["PYTHONPATH"] = os.pathsep.join([str(code), *[before] * bool(before)])
            ray.init(**options, log_to_driver=False, logging_level=logging.WARNING, include_dashboard=False)
            _warm_folder = folder if "_system_config" in options else None
    except Exception as error:  # Ray raises exceptions of many types
        from data import InputError  # imports torch

        reason = str(error).splitlines()[0].rstrip(".")
        sentence = f"Ray cannot start ({reason}); see the Ray documentation"
        if address:
            sentence = f"no Ray cluster answers at RAY_ADDRESS {address!r}; start one there, or unset it"
        raise InputError(sentence) from error
    try:
        yield
    finally:
        _warm_folder = None
        ray.shutdown()


def kill_processes() -> None:
    """Kill the processes of a local Ray that this one has started, and theirs."""
    import psutil  # a part of Ray

    def name(process: psutil.Process) -> str:
        with suppress(psutil.Error):  # it has ended
            return process.name()
        return ""

    while parents := [each for each in psutil.Process().children() if name(each) in ("gcs_server", "raylet")]:
        with suppress(psutil.NoSuchProcess):
            for process in [child for parent in parents for child in parent.children(recursive=True)] + parents:
                process.kill()
        psutil.wait_procs(parents, timeout=1)


def copy_code(target: Path) -> None:
    """Copy this project's modules and packages, for the trials, to a new folder.

    In the working directory, trials might find another train.py, or none. Unlike the project's folder, the copy has no
    data and no .gitignore, which Ray would obey. Python's compiled files save each worker half a second.
    """
    target.mkdir()
    packages = [path.parent for path in CODE.glob("*/__init__.py")]
    for path in CODE.glob("[!.]*.py"):
        shutil.copy2(path, target)  # keeps the time, by which Python knows what it has compiled
    for package in packages:
        shutil.copytree(package, target / package.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for folder in (CODE, *packages):
        compiled = folder / "__pycache__"
        with suppress(OSError):  # it may be missing, unreadable or just being removed, which does no harm
            shutil.copytree(compiled, target / compiled.relative_to(CODE))


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
            from data import InputError  # imports torch

            raise InputError(f"ulimit -{letter} {limit} is too low for Ray; raise it to at least {fewest}")


def local_options(settings: Settings) -> dict[str, Any]:
    """Return the arguments of ray.init that start a local Ray, whose workers are warm before they have a trial."""
    # Otherwise Ray writes a token into the home folder, which a container user may lack.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    for name in UNUSED:
        setattr(Node, name, lambda self, **options: None)
    cpus, gpus, per_trial = usable_cpus(), usable_gpus(settings), settings.gpus_per_trial
    # Ray starts a worker per CPU, and trials on GPUs hardly need CPUs. What a resumed search needs is not known yet.
    if gpus and not (settings.cpus_per_trial or settings.resume or settings.or_resume):
        cpus = min(cpus, gpus * max(TRIALS_PER_GPU, int(1 / per_trial) if per_trial else 0))
    options = {"address": "local", "num_cpus": cpus, "num_gpus": gpus}
    if cpus > MAX_WARM:
        return options
    # Ray would end idle workers once their CPUs are reserved, before a trial can take them.
    return options | {"_system_config": {"preload_python_modules": WARM, "kill_idle_workers_interval_ms": 0}}


def usable_gpus(settings: Settings) -> int:
    """Return how many GPUs torch, whose import takes seconds, can use here; ask it only if there may be any.

    Ray may count others (a Mac's), or none without NVIDIA's library.
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
