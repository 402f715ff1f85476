import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from data import InputError
from search import ray_runtime
from search.settings import Settings
from tests.conftest import REPOSITORY, processes_with, wait_for


def test_cpus_are_those_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runtime, "CGROUPS", tmp_path)
    monkeypatch.setattr(ray_runtime, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(ray_runtime.os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    assert ray_runtime.usable_cpus() == 3
    v2, v1 = {".": "", "jobs/1": "0::/jobs/1/a"}, {"cpu": "", "cpu,cpuacct/jobs/2": "4:pids:/x\n3:cpu,cpuacct:/jobs/2"}
    for folder, own in (v2 | v1).items():
        (tmp_path / "own").write_text(own)
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for quota, count in ((50_000, 1), (250_000, 2), (800_000, 3), (-1, 3)):
            files = {"cpu.max": f"{quota} 100000\n".replace("-1", "max")}
            if folder in v1:
                files = {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": "100000\n"}
            for name, text in files.items():
                (tmp_path / folder / name).write_text(text)
            assert ray_runtime.usable_cpus() == count


def test_trials_get_the_code_whatever_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = ["train.py", "data.py", "search/__init__.py", "search/files.py", "search/more/__init__.py", "search/x.json"]
    code += ["__pycache__/y.pyc", "search/__pycache__/z.pyc"]
    others = [".gitignore", "*", "pictures [2026]/a.tif", "old pictures /b.tif", ".venv/x.py", "search/.hidden/y"]
    for name in (*code, *others, ".#train.py", "notes/__pycache__/z.pyc"):
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text("data*\nmodel*\n*.py\n")
        os.utime(tmp_path / "project" / name, (0, 1e9))
    monkeypatch.setattr(ray_runtime, "CODE", tmp_path / "project")
    ray_runtime.copy_code(tmp_path / "copy")
    copied = {str(path.relative_to(tmp_path / "copy")): path for path in (tmp_path / "copy").rglob("*.*")}
    assert copied.keys() == set(code)
    assert all(path.stat().st_mtime == 1e9 for path in copied.values())


def test_limits_too_low_for_ray_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (40, 4096), resource.RLIMIT_NPROC: (100_000, 100_000)}  # Ray raises the first
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    monkeypatch.setattr(ray_runtime.os, "geteuid", lambda: 4711)  # root has no limit of threads
    ray_runtime.check_limits()
    for kind, letter in ((resource.RLIMIT_NOFILE, "n"), (resource.RLIMIT_NPROC, "u")):
        with monkeypatch.context() as patch:
            patch.setitem(limits, kind, (40, 40))
            with pytest.raises(InputError, match=f"ulimit -{letter} 40 is too low for Ray"):
                ray_runtime.check_limits()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("whom", ["the search", "all its processes", "nobody"])
def test_search_that_ends_while_ray_starts_says_why_and_leaves_nothing(whom: str, tmp_path: Path) -> None:
    ray_folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # short, for the paths of sockets
    marks = {"MARK": str(ray_folder), "RAY_TMPDIR": str(ray_folder), "RAY_ADDRESS": ""}
    images = ["--quick"] if whom != "nobody" else ["--dataset", "folder", "--data-dir", "nowhere"]
    script, output = str(REPOSITORY / "hparam_search.py"), tmp_path / "output.txt"
    command = [sys.executable, script, *images, "--output-dir", str(tmp_path / "outputs")]
    try:
        with output.open("w") as file:  # a session of its own, as its group is to get a signal
            process = subprocess.Popen(
                command, cwd=tmp_path, env=os.environ | marks, stdout=file, stderr=file, start_new_session=True
            )
        if whom != "nobody":  # while it waits for Ray, it imports torch
            wait_for(lambda: list(ray_folder.glob("*/session_latest/logs/raylet.out")))
            (os.kill if whom == "the search" else os.killpg)(process.pid, signal.SIGTERM)
        code, printed = process.wait(30), output.read_text()
        assert code == (2 if whom == "nobody" else 128 + signal.SIGTERM), printed
        sentence = (
            f"{tmp_path}/nowhere/train is not a folder; use a --data-dir with train/<class>/ and test/<class>/.\n"
        )
        assert printed.endswith(sentence if whom == "nobody" else ""), printed
        assert "Traceback" not in printed
        wait_for(lambda: not processes_with(str(ray_folder)))
        assert not list(ray_folder.iterdir())
        assert not (tmp_path / "outputs").exists()
    finally:
        shutil.rmtree(ray_folder)


def test_gpus_are_left_to_those_that_have_some_and_their_trials_need_few_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runtime, "usable_cpus", lambda: 64)
    for gpus, flags, expected in (
        (0, {}, (64, 0, False)),
        (2, {}, (4, 2, True)),
        (2, {"gpus_per_trial": 0.25}, (8, 2, True)),
        (2, {"gpus_per_trial": 2.0}, (4, 2, True)),
        (2, {"cpus_per_trial": 8}, (64, 2, False)),
        (2, {"resume": "outputs/it"}, (64, 2, False)),  # its --cpus-per-trial is not known yet
    ):
        monkeypatch.setattr(ray_runtime, "usable_gpus", lambda _, gpus=gpus: gpus)
        options = ray_runtime.local_options(Settings(**flags))
        found = options["num_cpus"], options["num_gpus"], "_system_config" in options
        assert found == expected
