"""Searches stopped by every kind of signal."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

import pytest

import hparam_search
from hparam_search import main
from search.records import LOG_FILE
from tests.conftest import kill_all, processes_with, quick, read_csv, start, wait_for

LONG = ["--num-samples", "1", "--scheduler", "none", "--max-epochs", "500"]


def listening(pids: list[int]) -> set[str]:
    """Return the addresses on which processes listen for TCP connections."""
    sockets = set()
    for path in (path for pid in pids for path in Path(f"/proc/{pid}/fd").glob("*")):
        with contextlib.suppress(OSError):
            sockets.add(str(path.readlink()))
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    listening = [line[1].split(":")[0][-8:] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets]
    return {socket.inet_ntoa(bytes.fromhex(address)[::-1]) for address in listening}


def become_a_job(mark: str, ray_folder: str) -> None:
    """Put this process into a group of its own, as a shell does; what it starts has the mark in its environment."""
    hparam_search.tuner.usable_cpus = lambda: 1
    os.setsid()
    os.environ |= {"MARK": mark, "RAY_TMPDIR": ray_folder}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_search_that_runs_is_left_alone_until_it_or_all_its_processes_are_stopped_and_says_how_to_resume(
    ray_started: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    signals = {"it alone": signal.SIGINT, "all_at_once": signal.SIGTERM, "ray_first": signal.SIGUSR1}
    parent = tempfile.mkdtemp(prefix="t", dir="/tmp")  # short, for the paths of sockets
    processes = {}
    try:
        for name in signals:  # the first joins a Ray; the others have Rays of their own, as a user's search has
            address, folder = ray_started if name == "it alone" else None, tmp_path / name
            output = tmp_path / f"{name}.txt"
            processes[name] = start(address, quick(folder, *LONG), output, become_a_job, str(folder), parent)
        for name, process in processes.items():
            folder = tmp_path / name
            wait_for(lambda log=folder / LOG_FILE: log.exists() and '"reported"' in log.read_text(), process)
            for command, words in (
                (["--resume", str(folder)], "another process is using the search in "),
                (quick(tmp_path / "new", "--warm-start", folder), f"another process is using the search in {folder}; "),
                (quick(folder), f"{folder} already exists"),
            ):
                assert main(command) == 2
                assert words in capsys.readouterr().err
            if name != "it alone":
                assert listening([process.pid, *processes_with(str(folder))]) == {"127.0.0.1"}
            if name == "ray_first":
                kill_all(str(folder))
            time.sleep(0.3)
            os.killpg(process.pid, signals[name])
        for name, process in processes.items():
            process.join(30)
            printed = Path(process.name).read_text()
            assert process.exitcode == 128 + signals[name], printed
            assert "Traceback" not in printed
            assert "Trial status: " in printed
            resume = f"hparam_search.py --resume {shlex.quote(str(tmp_path / name))}"
            assert printed.strip().splitlines()[-1].endswith(resume)
            assert {row["status"] for row in read_csv(tmp_path / name)} <= {"UNFINISHED", "PENDING"}
            assert not (tmp_path / name / "best_model").exists()
        wait_for(lambda: not processes_with(f"{tmp_path}/"))  # no orphans
        assert len(list(Path(parent).iterdir())) <= 1  # the logs of the Ray that died, at most
    finally:
        kill_all(f"{tmp_path}/")
        shutil.rmtree(parent)
