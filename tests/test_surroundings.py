"""Searches where people run them: from other folders and scripts, in containers and clusters, with any output."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from PIL import Image
from ray import tune
from ray.util import placement_group

import hparam_search
import train
from hparam_search import main
from search import predict
from search.best_model import read_best_model
from search.files import read_lines
from search.records import open_search
from tests import conftest
from tests.conftest import NAMESPACE, REPOSITORY, Finished, figures, quick, read_csv, run_search, second_node


@pytest.mark.waits_for_searches
def test_readmes_first_command_succeeds_where_it_is_hardest(quick_run: tuple[subprocess.Popen, Path]) -> None:
    process, called_from = quick_run
    code, err = process.wait(timeout=300), (called_from / "err").read_text()
    assert code == 0, err
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert (called_from / "out").read_text().startswith("10 classes")
    (folder,) = called_from.glob("*/my outputs/it")  # the home is replaced by the temporary folder
    assert not (called_from / "~").exists()
    assert not list(folder.glob(".*"))
    search, rows = open_search(folder, {}), read_csv(folder)
    assert sorted((row["status"], row["epochs"]) for row in rows) == [("TERMINATED", n) for n in "2244"]
    assert read_best_model(search)["test_accuracy"] > 0.6  # of ten classes
    if hasattr(os, "sched_setaffinity"):
        assert search.resources.startswith("1/1 CPUs, ")


def test_ray_that_cannot_be_joined_is_refused(ray_started: str, tmp_path: Path) -> None:
    processes = {}
    for i, address in enumerate(("nonsense", "http://there", "127.0.0.1:1", "127.0.0.1:99999")):
        processes[address] = conftest.start(address, quick(tmp_path / "it"), tmp_path / f"output_{i}.txt")
    for address, process in processes.items():
        process.join(30)  # Ray alone would wait for minutes
        process.kill()
        printed = Path(process.name).read_text()
        assert process.exitcode == 2, printed
        sentence = f"no Ray cluster answers at RAY_ADDRESS {address!r}; start one there, or unset it."
        assert printed == f"hparam_search.py: {sentence}\n"  # before images are read


@pytest.mark.usefixtures("trials_here")
def test_images_may_move_between_two_jobs(
    make_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make_folder({f"job_1/{split}": {"a": n, "b": n} for split, n in (("train", 20), ("test", 5))})
    monkeypatch.chdir(tmp_path)
    flags = ["--max-epochs", 1, "--num-samples", 1, "--dataset", "folder", "--data-dir", "job_1"]
    with monkeypatch.context() as patch:
        patch.setattr(tune, "run", lambda trial, **options: None)  # interrupted before it has trained
        assert run_search(tmp_path / "it", *flags) == 1
    (tmp_path / "job_1").rename(tmp_path / "job_2")
    assert main(["--resume", "it"]) == 2
    assert "job_1/train is not a folder" in capsys.readouterr().err
    picture = tmp_path / "job_2" / "train" / "a" / "000.png"
    picture.rename(picture.with_name("999.png"))
    assert main(["--resume", "it", "--data-dir", "job_2"]) == 2  # their order is another one
    assert "the training images in" in capsys.readouterr().err
    picture.with_name("999.png").rename(picture)
    assert main(["--resume", "it", "--data-dir", "job_2"]) == 0
    config = json.loads((tmp_path / "it" / "best_model" / "config.json").read_text())
    assert config["images"]["data_dir"] == str(tmp_path / "job_2")


def see_two_cpus() -> None:
    hparam_search.tuner.machines = lambda: [(1, 0), (1, 0)]


@pytest.mark.waits_for_searches
@pytest.mark.usefixtures("small_search")
def test_node_may_die_or_see_another_disk(
    ray_started: str, killed: Future, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Trials of a node that dies continue on another; one that does not see the folder fails them with a sentence."""
    killed.result()  # and its CPU is free
    assert placement_group([{"CPU": 2}]).wait(60)  # the first node has one left
    # If possible, the second has nothing of the program: Ray brings it along.
    files = " ".join(f"{REPOSITORY / name}.py" for name in ("hparam_search", "train", "model", "data"))
    hide = f'mount -t tmpfs none {REPOSITORY}/search; for f in {files}; do mount --bind /dev/null $f; done; exec "$@"'
    folder, output, mark = tmp_path / "it", tmp_path / "output.txt", str(tmp_path)
    flags = ["--num-samples", "1", "--max-epochs", "48", "--scheduler", "none"]
    with second_node(ray_started, mark, [*NAMESPACE, "sh", "-c", hide, "sh"] if NAMESPACE else []):
        process = conftest.start(ray_started, quick(folder, *flags), output, see_two_cpus)
        conftest.wait_for(lambda: len(conftest.epochs_saved(folder)) == 2, process)
        saved = conftest.epochs_saved(folder)
        conftest.kill_all(mark)
        process.join(120)
    assert process.exitcode == 0, output.read_text()
    restarts = [event for event in read_lines(folder / "log.jsonl")[0] if event["event"] == "restarted"]
    assert all(event["epoch"] >= saved[event["trial"]] for event in restarts)
    assert [(row["status"], row["epochs"]) for row in read_csv(folder)] == [("TERMINATED", "48")] * 2

    if not NAMESPACE:
        pytest.skip("no mount namespaces here, for a node that sees another disk")
    folder = tmp_path / "disk" / "it"
    folder.parent.mkdir()
    monkeypatch.setattr(hparam_search, "MAX_FAILURES_PER_TRIAL", 0)
    monkeypatch.setattr(hparam_search.tuner, "machines", lambda: [(1, 0), (1, 0)])
    other_disk = f'mount -t tmpfs none {folder.parent} && exec "$@"'
    with second_node(ray_started, mark, [*NAMESPACE, "sh", "-c", other_disk, "sh"]):
        flags[3] = "100"  # so that the first trial is not over before the second node has a worker
        assert run_search(folder, *flags) == 0
    (failed,) = [trial for trial in open_search(folder, {}).trials.values() if trial.error]
    sentence = f"this machine does not see {folder}; pass an --output-dir on a disk that all machines share"
    assert failed.error == f"OSError: {sentence}"
    assert f"{failed.name} failed: OSError: {sentence}.\n" in capsys.readouterr().err


@pytest.mark.usefixtures("trials_here")
def test_readme_adds_a_hyperparameter_and_earlier_models_and_searches_keep_working(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    in_train, in_space = re.search(r"```python\n(.*in OPTIMIZER.*\n)(.*\n)```", readme).groups()
    for key, values in eval("{" + in_train + "}", vars(train)).items():
        for table, value in ((train.OPTIMIZER, values), (train.CONFIG_KEYS, values), (train.DEFAULTS, values.default)):
            monkeypatch.setitem(table, key, value)
    monkeypatch.setattr(hparam_search, "param_space", space := hparam_search.param_space | {"dampening": 0.0})
    folder, picture = shutil.copytree(finished.folder, tmp_path / "it"), tmp_path / "red.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    assert predict.main([str(folder / "best_model"), str(picture)]) == 0
    assert main(["--resume", str(folder), "--num-samples", "3"]) == 0
    space |= eval("{" + in_space + "}", vars(hparam_search))
    assert main(["--resume", str(folder), "--num-samples", "4"]) == 2
    printed = capsys.readouterr()
    assert "'dampening' is {'tune': 'uniform', 'lower': 0.0, 'upper': 0.5}, but was 0.0 when" in printed.err
    assert "damaged" not in printed.out + printed.err
    space["nesterov"] = False
    assert run_search(tmp_path / "new", "--num-samples", "1", "--max-epochs", "1") == 0
    rows, new = read_csv(folder), read_csv(tmp_path / "new")
    assert [(row["dampening"], row["status"]) for row in rows] == [("0.0", "TERMINATED")] * 6
    without = "seconds images_per_second dampening weights"
    assert figures(folder, without)[:4] == figures(finished.folder, without)
    assert all(0 < float(row["dampening"]) < 0.5 and row["status"] == "TERMINATED" for row in new)
