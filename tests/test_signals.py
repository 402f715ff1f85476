"""Searches stopped by every kind of signal."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray import tune

import hparam_search
from hparam_search import main
from search.records import FINISHED
from tests.conftest import REPOSITORY, make_small, processes_with, read_csv, reported_epochs, start, wait_for

COMMAND = ["--quick", "--num-samples", "1", "--scheduler", "none"]
SCRIPT = """
import sys
import hparam_search
from tests.conftest import make_small
make_small(setattr)
hparam_search.PATIENCE = 1000
sys.exit(hparam_search.main(sys.argv[1:]))
"""


def keep_on() -> None:
    hparam_search.PATIENCE = 1000


def ignore_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def listening(pids: list[int]) -> set[str]:
    """Return the addresses on which processes listen for TCP connections."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            sockets |= {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[i] for i in (1, 3, 9))
            if state == "0A" and f"socket:[{inode}]" in sockets:
                addresses.add(socket.inet_ntoa(bytes.fromhex(local.split(":")[0][-8:])[::-1]))
    return addresses


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_searches_whose_processes_are_all_told_to_stop(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    processes, codes = {}, {"all_at_once": 143, "ray_first": 138}
    for name in codes:  # each has a Ray of its own, as a user's search has
        command = [*COMMAND, "--max-epochs", "500", "--output-dir", str(tmp_path), "--name", name]
        processes[name] = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *command],
            env=environment | {"MARK": f"{tmp_path}/{name}"}, cwd=REPOSITORY, start_new_session=True,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    try:
        for name, process in processes.items():
            mark = f"MARK={tmp_path}/{name}"
            wait_for(lambda name=name, process=process: reported_epochs(tmp_path / name) or process.poll() is not None)
            if name == "all_at_once":
                assert listening(processes_with(mark)) == {"127.0.0.1"}
                os.killpg(process.pid, signal.SIGTERM)
            else:
                for pid in processes_with(mark):
                    if pid != process.pid:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                time.sleep(0.3)
                process.send_signal(signal.SIGUSR1)
        for name, process in processes.items():
            out, err = process.communicate(timeout=30)
            assert process.returncode == codes[name], err
            assert "Trial status: 1 UNFINISHED" in out
            assert out.strip().splitlines()[-1].endswith(f"hparam_search.py --resume {tmp_path / name}")
            assert "Traceback" not in out
            assert [row["status"] for row in read_csv(tmp_path / name)] == ["UNFINISHED"]
            assert not (tmp_path / name / "best_model").exists()
        wait_for(lambda: not processes_with(f"MARK={tmp_path}/"), 30)  # no orphans
    finally:
        for process in processes.values():
            process.kill()


def test_searches_are_interrupted_or_go_on(
    own_address: str, small_search: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    processes, outputs = {}, {name: tmp_path / f"{name}.txt" for name in ("interrupted", "hung_up", "nohup")}
    signals = {"interrupted": signal.SIGINT, "hung_up": signal.SIGHUP, "nohup": signal.SIGHUP}
    for name, output in outputs.items():
        command = [*COMMAND, "--output-dir", str(tmp_path), "--name", name]
        prepare, epochs = (ignore_hangups, 20) if name == "nohup" else (keep_on, 500)
        processes[name] = start(own_address, [*command, "--max-epochs", str(epochs)], output, prepare)
        wait_for(lambda name=name: reported_epochs(tmp_path / name))
        if name == "interrupted":  # what is running is left alone
            assert main(["--resume", str(tmp_path / name)]) == 2
            assert "another process is running" in capsys.readouterr().err
            assert main(["--quick", "--output-dir", str(tmp_path), "--name", name]) == 2
            assert f"--name {name} is taken" in capsys.readouterr().err
        os.kill(processes[name].pid, signals[name])
        processes[name].join(150)
    for name, code in {"interrupted": 130, "hung_up": 129, "nohup": 0}.items():
        printed = outputs[name].read_text()
        assert processes[name].exitcode == code, printed
        assert "Traceback" not in printed
        assert (tmp_path / name / "best_model").exists() == (code == 0)
        assert all(row["status"] in FINISHED for row in read_csv(tmp_path / name)) == (code == 0)
        last = printed.strip().splitlines()[-1]
        assert last.endswith(f"hparam_search.py --resume {tmp_path / name}") == (code != 0)

    # What has been edited since is refused.
    folder = str(tmp_path / "interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hparam_search, "QUICK_SPACE", hparam_search.QUICK_SPACE | {"lr": tune.loguniform(1e-3, 1e-1)})
        assert main(["--resume", folder]) == 2
        assert "param_space['lr'] is Float(lower=0.001" in capsys.readouterr().err
        make_small(patch.setattr)
        patch.setattr(hparam_search, "QUICK_IMAGES", {"num_train": 251, "num_test": 100, "num_classes": 5})
        patch.setattr(hparam_search, "QUICK_SPACE", hparam_search.QUICK_SPACE | {"lr": tune.loguniform(1e-2, 1e-1)})
        assert main(["--resume", folder]) == 2
        assert "the training images in" in capsys.readouterr().err
