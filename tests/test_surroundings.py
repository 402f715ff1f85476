"""Searches where people run them: from other folders and scripts, in containers and clusters, with any output."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from PIL import Image
from ray import tune

import hparam_search
from hparam_search import main
from search.files import read_lines
from search.records import open_search
from tests import conftest
from tests.conftest import EXAMPLE, NAMESPACE, REPOSITORY, Finished, figures, node, quick, read_csv, run_search

# A notebook somewhere else, or a script, that calls the search.
CALLER = """
import os
import sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.path.insert(0, %r)
import hparam_search
from tests.conftest import make_small
make_small(setattr)
sys.exit(hparam_search.main(sys.argv[1:]))
"""


def test_search_from_another_folder_and_without_an_output_finds_the_same(finished: Finished, tmp_path: Path) -> None:
    for name in ("train", "data", "model", "search"):  # another project's, in the folder that it is called from
        (tmp_path / f"{name}.py").write_text("raise SystemExit('another project')")
    (tmp_path / "caller.py").write_text(CALLER % str(REPOSITORY))
    scratch = tmp_path / ("a_batch_system_has_long_names_for_" * 3)
    scratch.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_ADDRESS": " ", "TMPDIR": str(scratch), "PYTHONIOENCODING": "ascii", "HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "caller.py", *quick(Path("~", "my outputs", "it"), *EXAMPLE)],
        cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline().startswith("5 classes")
    process.stdout.close()  # as `| head -1` does
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    folder = tmp_path / "my outputs" / "it"
    assert figures(folder) == figures(finished.folder)
    if hasattr(os, "sched_setaffinity"):
        assert open_search(folder, {}).resources == "1/1 CPUs, 0/0 GPUs"
    assert not (tmp_path / "~").exists()
    assert not list(folder.glob(".*"))


def test_ray_that_cannot_be_joined_is_refused(ray_started: str, tmp_path: Path) -> None:
    for i, address in enumerate(("nonsense", "http://there", "127.0.0.1:1", "127.0.0.1:99999")):
        output = tmp_path / f"output_{i}.txt"
        process = conftest.start(address, quick(tmp_path / "it"), output)
        process.join(30)  # Ray alone would wait for minutes
        process.kill()
        assert process.exitcode == 2, output.read_text()
        sentence = f"no Ray cluster answers at RAY_ADDRESS {address!r}; start one there, or unset it."
        assert output.read_text().endswith(f"\nhparam_search.py: {sentence}\n")


@pytest.mark.usefixtures("small_search")
def test_sigterm_while_ray_starts_is_a_signal_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: sys.exit(15))  # as the handler that Ray has set by then
    assert run_search(tmp_path / "it") == 143


def test_home_is_replaced_in_a_container_without_one() -> None:
    command = [sys.executable, "-c", "import search; from pathlib import Path; print(Path.home())"]
    home = subprocess.check_output(command, cwd=REPOSITORY, env=os.environ | {"HOME": "~"}, text=True)
    assert Path(home.strip()).is_dir()


@pytest.mark.usefixtures("trials_here")
def test_images_may_move_between_two_jobs(
    make_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make_folder({f"job_1/{split}": {"a": n, "b": n} for split, n in (("train", 20), ("test", 5))})
    monkeypatch.chdir(tmp_path)
    flags = ["--max-epochs", 1, "--num-samples", 1, "--dataset", "folder", "--data-dir", "job_1"]
    with monkeypatch.context() as patch:
        patch.setattr(tune.Tuner, "fit", lambda tuner: None)  # interrupted before it has trained
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


def wait_for_node(resource: str, count: int, max_failures: int) -> None:
    hparam_search.MAX_FAILURES_PER_TRIAL = max_failures
    ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False)
    conftest.wait_for(lambda: ray.cluster_resources().get(resource) == count)
    ray.shutdown()  # for the search to join it


@pytest.mark.waits_for_searches
def test_trials_of_a_node_that_dies_continue_on_another(cluster: str, tmp_path: Path) -> None:
    folder, output, mark = tmp_path / "it", tmp_path / "output.txt", f"second_of_{tmp_path}"
    # If possible, this node has nothing of the program: Ray brings it along.
    files = " ".join(f"{REPOSITORY / name}.py" for name in ("hparam_search", "train", "model", "data"))
    hide = f'mount -t tmpfs none {REPOSITORY}/search; for f in {files}; do mount --bind /dev/null $f; done; exec "$@"'
    flags = ["--num-samples", "1", "--max-epochs", "24", "--scheduler", "none"]
    with node(mark, "--address", cluster, within=[*NAMESPACE, "sh", "-c", hide, "sh"] if NAMESPACE else []):
        process = conftest.start(cluster, quick(folder, *flags), output, wait_for_node, "CPU", 2, 2)
        conftest.wait_for(lambda: len(conftest.epochs_saved(folder)) == 2, process)
        saved = conftest.epochs_saved(folder)
        conftest.kill_all(mark)
        process.join(120)
    assert process.exitcode == 0, output.read_text()
    restarts = [event for event in read_lines(folder / "log.jsonl")[0] if event["event"] == "restarted"]
    assert all(event["epoch"] >= saved[event["trial"]] for event in restarts)
    assert [(row["status"], row["epochs"]) for row in read_csv(folder)] == [("TERMINATED", "24")] * 2


@pytest.mark.waits_for_searches
@pytest.mark.skipif(not NAMESPACE, reason="no mount namespaces here, for a node that sees another disk")
def test_node_that_does_not_see_the_folder_fails_its_trials_with_a_sentence(cluster: str, tmp_path: Path) -> None:
    folder, output, mark = tmp_path / "disk" / "it", tmp_path / "output.txt", f"blind_of_{tmp_path}"
    folder.parent.mkdir()
    within = [*NAMESPACE, "sh", "-c", f'mount -t tmpfs none {folder.parent} && exec "$@"', "sh"]
    with node(mark, "--address", cluster, "--resources", '{"blind": 1}', within=within):
        flags = ["--num-samples", "1", "--max-epochs", "1"]
        process = conftest.start(cluster, quick(folder, *flags), output, wait_for_node, "blind", 1, 0)
        process.join(120)
    assert process.exitcode == 0, output.read_text()
    (failed,) = [trial for trial in open_search(folder, {}).trials.values() if trial.error]
    sentence = f"this machine does not see {folder}; pass an --output-dir on a disk that all machines share"
    assert failed.error == f"OSError: {sentence}"
    assert f"{failed.name} failed: OSError: {sentence}.\n" in output.read_text()


# What README says under "Add a hyperparameter", done between two commands.
ADDED = """
import sys
sys.path.insert(0, sys.argv[1])
import hparam_search
from ray import tune
from search import predict
from tests.conftest import make_small, make_trials_here, quick
from pathlib import Path
make_small(setattr)
make_trials_here(setattr)
space, in_space, search, picture = hparam_search.param_space, sys.argv[2], Path(sys.argv[3]), sys.argv[4]
space["dampening"] = 0.0
assert predict.main([str(search / "best_model"), picture]) == 0
assert hparam_search.main(["--resume", str(search), "--num-samples", "3"]) == 0
space |= eval("{" + in_space + "\\n}")
assert hparam_search.main(["--resume", str(search), "--num-samples", "4"]) == 2
space["nesterov"] = False
assert hparam_search.main(quick(search.parent / "new", "--num-samples", "1", "--max-epochs", "1")) == 0
"""


def test_readme_adds_a_hyperparameter_and_earlier_models_and_searches_keep_working(
    finished: Finished, ray_started: str, tmp_path: Path
) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    in_train, in_space = re.search(r"```python\n(.*in OPTIMIZER.*\n)(.*)\n```", readme).groups()
    project, folder = tmp_path / "project", shutil.copytree(finished.folder, tmp_path / "it")
    for name in ("search", "tests"):
        shutil.copytree(REPOSITORY / name, project / name)
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, project)
    text = (project / "train.py").read_text()
    (project / "train.py").write_text(text.replace("\nOPTIMIZER = {", "\nOPTIMIZER = {\n" + in_train))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    command = [sys.executable, "-c", ADDED, str(project), in_space, str(folder), str(tmp_path / "red.png")]
    result = subprocess.run(
        command, env=os.environ | {"RAY_ADDRESS": ray_started}, cwd=tmp_path, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stderr
    assert "'dampening' is {'tune': 'uniform', 'lower': 0.0, 'upper': 0.5}, but was 0.0 when" in result.stderr
    assert "damaged" not in result.stdout + result.stderr
    rows = read_csv(folder)
    assert [row["dampening"] for row in rows] == ["0.0"] * 6
    assert [row["status"] for row in rows] == ["TERMINATED"] * 6
    assert figures(folder, "seconds images_per_second dampening weights")[:4] == figures(
        finished.folder, "seconds images_per_second weights"
    )
    assert all(
        0 < float(row["dampening"]) < 0.5 and row["status"] == "TERMINATED" for row in read_csv(tmp_path / "new")
    )
