"""Searches where people run them: from other folders and scripts, in containers and batch jobs, with any output."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hparam_search
from hparam_search import main
from search.output import printing_safely
from search.ray_session import options_of_own
from tests.conftest import REPOSITORY, SMALL_IMAGES, figures

# A notebook somewhere else, or a script, that calls the search.
CALLER = """
import os
import sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.path.insert(0, %r)
import hparam_search
hparam_search.QUICK_IMAGES = {"num_train": 250, "num_test": 100, "num_classes": 5}
sys.exit(hparam_search.main(sys.argv[1:]))
"""
COMMAND = ["--quick", "--num-samples", "1", "--max-epochs", "1", "--name", "it"]


@pytest.mark.usefixtures("ray_started")
def test_search_in_odd_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train", "data", "model", "search"):  # another project's, in the folder that it is called from
        (tmp_path / f"{name}.py").write_text("raise SystemExit('another project')")
    (tmp_path / "caller.py").write_text(CALLER % str(REPOSITORY))
    scratch = tmp_path / ("a_batch_system_has_long_names_for_" * 3)
    scratch.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_ADDRESS": " ", "TMPDIR": str(scratch), "PYTHONIOENCODING": "ascii", "HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "caller.py", *COMMAND, "--output-dir=~/my outputs"],
        cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline().startswith("5 classes")
    process.stdout.close()  # as `| head -1` does
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    folder = tmp_path / "my outputs" / "it"
    assert [row["status"] for row in figures(folder)] == ["TERMINATED"] * 2
    if hasattr(os, "sched_setaffinity"):
        assert json.loads((folder / "search.json").read_text())["resource_usage"] == "1/1 CPUs, 0/0 GPUs"
    assert (folder / "best_model" / "weights.pt").exists()
    assert not (tmp_path / "~").exists()
    assert not list(folder.glob(".ray_*"))
    # Digit for digit what it finds anywhere else.
    monkeypatch.setattr(hparam_search, "QUICK_IMAGES", SMALL_IMAGES)
    assert main([*COMMAND, "--output-dir", str(tmp_path)]) == 0
    assert figures(tmp_path / "it") == figures(folder)


@pytest.mark.parametrize("address", ["nonsense", "http://there", "127.0.0.1:1", "127.0.0.1:99999"])
def test_address_without_a_cluster_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_search: None, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda address, **_: pytest.fail("Ray waits") if ":" in address[5:] else refuse())
    assert main([*COMMAND, "--output-dir", str(tmp_path)]) == 2
    sentence = f"hparam_search.py: no Ray cluster answers at RAY_ADDRESS {address!r}; start one there, or unset it.\n"
    assert capsys.readouterr().err == sentence


def refuse() -> None:
    raise ValueError("as Ray does with what is no address")


def test_ray_that_was_started_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_search: None, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("search.ray_session.ray.get_runtime_context", lambda: Context)
    assert main([*COMMAND, "--output-dir", str(tmp_path)]) == 2
    assert "call ray.shutdown() first" in capsys.readouterr().err


class Context:
    runtime_env: dict = {}  # noqa: RUF012


def test_temporary_folder_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / ("long" * 20)))
    assert options_of_own()["_temp_dir"] == "/tmp/ray"
    monkeypatch.setattr("search.ray_session.os.access", lambda *_: False)
    with pytest.raises(hparam_search.InputError, match=r"sockets into .*longlong.*; set TMPDIR to a writable folder"):
        options_of_own()


def test_home_that_is_missing_and_streams_that_are_closed(tmp_path: Path) -> None:
    # Without a home, Python leaves ~ as it is. What is opened later must not get number 1 or 2.
    script = "import search, sys; from pathlib import Path; f = open(sys.argv[1], 'w')"
    script += "; print(f.fileno(), Path.home(), file=f)"
    command = f'exec "{sys.executable}" -c "{script}" {tmp_path}/out <&- >&- 2>&-'
    subprocess.run(["sh", "-c", command], cwd=REPOSITORY, env=os.environ | {"HOME": "~"}, check=True)
    number, home = (tmp_path / "out").read_text().split()
    assert int(number) > 2
    assert Path(home).is_dir()


class Full(io.StringIO):
    """A log on a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError("No space left on device")


def test_output_that_fails_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    closed_pipe, ascii_bytes, closed = os.fdopen(write_end, "w"), io.BytesIO(), io.StringIO()
    closed.close()
    for stream in (closed_pipe, io.TextIOWrapper(ascii_bytes, "ascii"), Full(), closed):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        with contextlib.suppress(OSError, ValueError):
            print("before", file=stream)
        with printing_safely():
            print("32×32", flush=True)
            print("─" * 100_000)
            print("to stderr", file=sys.stderr)
            assert not sys.stdout.isatty()
        assert sys.stdout is stream
        with contextlib.suppress(ValueError):
            stream.flush()  # as Python does when it exits
    assert ascii_bytes.getvalue().startswith(b"before\n32?32\n???")


@pytest.mark.usefixtures("ray_started", "small_search")
def test_images_may_move_between_two_jobs(
    make_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make_folder({f"job_1/{split}": {"a": n, "b": n} for split, n in (("train", 20), ("test", 5))})
    monkeypatch.chdir(tmp_path)
    command = [*COMMAND, "--dataset", "folder", "--data-dir", "job_1", "--time-budget", "0.001s"]
    assert main(command) == 1
    (tmp_path / "job_1").rename(tmp_path / "job_2")
    resume = ["--resume", "outputs/it", "--time-budget", "1h"]
    assert main(resume) == 2
    assert "job_1/train is not a folder" in capsys.readouterr().err
    (tmp_path / "job_1").symlink_to("job_2")
    (tmp_path / "job_2" / "train" / "a" / "000.png").rename(tmp_path / "job_2" / "train" / "a" / "999.png")
    assert main([*resume, "--data-dir", "job_2"]) == 2  # these are others
    assert "the training images in" in capsys.readouterr().err
    (tmp_path / "job_2" / "train" / "a" / "999.png").rename(tmp_path / "job_2" / "train" / "a" / "000.png")
    (tmp_path / "job_1").unlink()
    assert main([*resume, "--data-dir", "job_2"]) == 0
    config = json.loads((tmp_path / "outputs" / "it" / "best_model" / "config.json").read_text())
    assert config["images"]["data_dir"] == str(tmp_path / "job_2")
    assert main(["--resume", "outputs/it", "--data-dir", "nowhere", "--num-samples", "2"]) == 2
    assert "nowhere/train is not a folder" in capsys.readouterr().err
