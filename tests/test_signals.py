"""Searches stopped by every kind of signal."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest

import hparam_search
from hparam_search import main
from tests.conftest import has_reported, kill_all, processes_with, quick, read_csv, run_search, start, wait_for

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


def check_interrupted(folder: Path, printed: str) -> None:
    assert "Traceback" not in printed
    assert "Trial status: " in printed
    assert printed.strip().splitlines()[-1].endswith(f"hparam_search.py --resume {shlex.quote(str(folder))}")
    assert {row["status"] for row in read_csv(folder)} <= {"UNFINISHED", "PENDING"}
    assert not (folder / "best_model").exists()


def become_a_job(mark: str, ray_folder: str) -> None:
    """Put this process into a group of its own, as a shell does; what it starts has the mark in its environment."""
    hparam_search.tuner.usable_cpus = lambda: 1
    os.setsid()
    os.environ["MARK"] = mark
    os.environ["RAY_TMPDIR"] = ray_folder


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_search_whose_processes_are_all_told_to_stop_says_how_to_resume(ray_started: str, tmp_path: Path) -> None:
    codes = {"all_at_once": 143, "ray_first": 138}
    parent = tempfile.mkdtemp(prefix="t", dir="/tmp")  # short, for the paths of sockets
    processes = {
        name: start(
            None, quick(tmp_path / name, *LONG), tmp_path / f"{name}.txt", become_a_job, f"{tmp_path}/{name}", parent
        )
        for name in codes  # each has a Ray of its own, as a user's search has
    }
    try:
        for name, process in processes.items():
            wait_for(partial(has_reported, tmp_path / name), process)
            others = processes_with(f"MARK={tmp_path}/{name}")
            if name == "all_at_once":
                assert listening([process.pid, *others]) == {"127.0.0.1"}
                os.killpg(process.pid, signal.SIGTERM)
            else:
                for pid in others:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.3)
                os.kill(process.pid, signal.SIGUSR1)
        for name, process in processes.items():
            process.join(30)
            printed = (tmp_path / f"{name}.txt").read_text()
            assert process.exitcode == codes[name], printed
            check_interrupted(tmp_path / name, printed)
        wait_for(lambda: not processes_with(f"MARK={tmp_path}/"))  # no orphans
        assert len(list(Path(parent).iterdir())) <= 1  # the logs of the Ray that died, at most
    finally:
        kill_all(f"{tmp_path}/")
        shutil.rmtree(parent)


def test_search_that_runs_is_left_alone_until_it_is_interrupted(
    ray_started: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, output = tmp_path / "it is", tmp_path / "output.txt"
    process = start(ray_started, quick(folder, *LONG), output)
    wait_for(lambda: has_reported(folder), process)
    assert main(["--resume", str(folder)]) == 2
    assert "another process is using the search in " in capsys.readouterr().err
    assert run_search(tmp_path / "new", "--warm-start", folder) == 2
    assert f"another process is using the search in {folder}; wait" in capsys.readouterr().err
    assert run_search(folder) == 2
    assert f"{folder} already exists" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130, output.read_text()
    check_interrupted(folder, output.read_text())
