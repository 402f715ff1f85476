import resource
from pathlib import Path

import pytest

from data import InputError
from search import ray_runtime


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
    others = [".gitignore", "*", "pictures [2026]/a.tif", "old pictures /b.tif", ".venv/x.py", "search/.hidden/y"]
    for name in (*code, *others, "search/__pycache__/z.pyc", "notes/z.py"):
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text("data*\nmodel*\n*.py\n")
    monkeypatch.setattr(ray_runtime, "CODE", tmp_path / "project")
    (tmp_path / "copy").mkdir()
    ray_runtime.copy_code(tmp_path / "copy")
    assert {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*.*")} == set(code)


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
