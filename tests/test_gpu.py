"""What can only break on a GPU."""

import contextlib
import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.recipes import BASELINE_RECIPE
from data import Batches, Dataset, make_synthetic
from hparam_search import main, param_space
from search.best_model import load_model
from search.files import read_lines
from search.referee import error_sentence
from search.trial import TRAINING_FILE, restore_training, run_trial, save_training, save_weights, weights_path
from tests.conftest import REPOSITORY, figures, read_csv
from tests.helpers import ACCURACY, CPU
from train import EAGER_STEPS, Report, Training, TrainStep, evaluate, evaluation_batches, new_training, train_epochs

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
IMAGES = make_synthetic(num_train=375, num_test=100, num_classes=5)  # 300 for training, 75 for validation
# At these low learning rates, rounding errors do not make two trainings diverge.
CONFIG = param_space | {"epochs": 3, "h_1": 8, "h_2": 32, "p_drop": 0.3, "lr": 5e-4, "batch_size": 24, "seed": 5}
CONFIG |= {"bias_lr": 2e-3}
SCALE = 20.0  # of the learning rates, for steps that change the weights visibly
RECIPES = {
    "default": CONFIG,
    "baseline": CONFIG | BASELINE_RECIPE,
    "one_cycle": CONFIG | {"schedule": "one_cycle"},
    "no momentum": CONFIG | {"momentum": 0.0, "nesterov": False},
    "fewer images than a batch": CONFIG | {"batch_size": 1000, "epochs": 8},
}


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list:
    """A list that has an entry for every launch of a graph."""
    launched, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: launched.append(replay(graph)))
    return launched


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def weights(training: Training) -> torch.Tensor:
    """Return the evaluated weights as one vector, without the statistics of batch norm."""
    return torch.cat([weight.detach().flatten() for weight in training.evaluated.parameters()]).clone()


class Result(NamedTuple):
    """What came of a training."""

    reports: list[Report]
    before: torch.Tensor  # weights
    after: torch.Tensor
    notes: list[str]


def run(config: dict, dataset: Dataset = IMAGES) -> Result:
    """Train from start to end."""
    training = new_training(config, len(dataset.classes), GPU)
    before = weights(training)
    return Result(list(train_epochs(training, config, dataset, GPU)), before, weights(training), training.notes)


def assert_alike(one: Result, other: Result) -> None:
    """Compare two trainings. The limits are twice the rounding error, and below the effect of a bug."""
    assert_losses_alike(one.reports, other.reports)
    assert (one.after - other.after).norm() < 0.12 * (other.after - other.before).norm()


def assert_losses_alike(reports: list[Report], others: list[Report]) -> None:
    for one, other in zip(reports, others, strict=True):
        assert (one.loss, one.train_loss) == pytest.approx((other.loss, other.train_loss), rel=0.004)


def batches(**options: bool) -> Batches:
    """Return the training images on the GPU."""
    images, labels = IMAGES.train_images.to(GPU), IMAGES.train_labels.to(GPU)
    return Batches(images, labels, 24, IMAGES.mean, IMAGES.std, drop_last=True, **options)


@pytest.mark.parametrize("recipe", RECIPES)
def test_captured_steps_are_the_eager_ones(recipe: str, replays: list, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RECIPES[recipe]
    captured = run(config)
    steps = config["epochs"] * max(1, len(IMAGES.train_images) // config["batch_size"])
    assert captured.notes == []
    assert len(replays) == steps - EAGER_STEPS >= 5
    monkeypatch.setattr(TrainStep, "replay", TrainStep.descend)
    assert_alike(captured, run(config))
    assert len(replays) == steps - EAGER_STEPS


def test_captured_steps_are_exactly_the_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.autocast_dtype", lambda device: None)  # rounding is then far below a bug's effect
    training, two_batches = new_training(CONFIG, 5, GPU), list(itertools.islice(batches().epoch(), 2))
    step = TrainStep(training, CONFIG, GPU)
    for _ in range(EAGER_STEPS):
        step(*two_batches[0], SCALE)
    momentum = [tensor for group in training.groups for tensor in group.momentum.values()]
    state = [*training.model.state_dict().values(), *training.averaged.state_dict().values(), *momentum]
    before = [tensor.clone() for tensor in state]

    def moved() -> list[torch.Tensor]:
        """Return by how much two steps change the state."""
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        torch.manual_seed(7)  # dropout
        for batch, scale in zip(two_batches, (SCALE, 2 * SCALE), strict=True):
            step(*batch, scale)
        return [(tensor - value).float() for tensor, value in zip(state, before, strict=True)]

    captured = moved()
    assert training.notes == []
    assert step.graph
    monkeypatch.setattr(TrainStep, "replay", TrainStep.descend)
    for one, other in zip(captured, moved(), strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()


def print_failed_captures() -> None:
    """Train twice in one process, with a failed capture in the first; print the results and replay count as JSON."""
    descend, replays = TrainStep.descend, []

    def waiting(step: TrainStep, images: torch.Tensor, labels: torch.Tensor) -> None:
        descend(step, images, labels)
        step.sums.tolist()  # which no graph can hold

    torch.backends.cudnn.deterministic = True
    torch.cuda.CUDAGraph.replay = lambda graph: replays.append(graph)
    TrainStep.descend = waiting
    first = run(CONFIG)
    TrainStep.descend = descend  # which could be captured
    second = run(CONFIG)
    trainings = [[[asdict(report) for report in each.reports], each.notes] for each in (first, second)]
    print(json.dumps([*trainings, len(replays)]), flush=True)
    os._exit(0)  # the failed capture may break cleanup


def test_failed_capture_is_told_and_the_process_trains_eagerly() -> None:
    # In a subprocess: a failed capture leaves torch's memory pools unusable (torch 2.11).
    command = [sys.executable, "-c", "from tests.test_gpu import print_failed_captures as it; it()"]
    *trainings, replays = json.loads(subprocess.check_output(command, text=True, cwd=REPOSITORY).splitlines()[-1])
    assert replays == 0
    expected = run(CONFIG)
    for reports, notes in trainings:
        assert len(notes) == 1
        assert notes[0].startswith("CUDA graph capture failed (")
        assert_losses_alike([Report(**each) for each in reports], expected.reports)


def test_no_wait_for_the_gpu_within_an_epoch() -> None:
    training, shuffled = new_training(CONFIG, 5, GPU), batches(shuffle=True, crop_padding=2, flip=True)
    step = TrainStep(training, CONFIG, GPU)
    training.model.train()
    for epoch in (1, 2):  # in the first one the step is captured
        torch.cuda.set_sync_debug_mode("error" if epoch == 2 else "default")
        try:
            for batch in shuffled.epoch(epoch):
                step(*batch, SCALE)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert training.notes == []
    assert step.graph


def test_restored_in_mid_run_and_loads_on_a_cpu(tmp_path: Path) -> None:
    expected, training, path = run(CONFIG), new_training(CONFIG, 5, GPU), weights_path(tmp_path, 1)
    first = next(train_epochs(training, CONFIG, IMAGES, GPU))
    save_weights(training.evaluated, path)
    save_training(training, CONFIG, tmp_path / TRAINING_FILE)
    restored = restore_training(CONFIG, 5, GPU, tmp_path / TRAINING_FILE)
    assert restored.notes == []
    reports = [first, *train_epochs(restored, CONFIG, IMAGES, GPU)]
    assert [report.epoch for report in reports] == [1, 2, 3]
    assert_alike(expected._replace(reports=reports, after=weights(restored)), expected)

    load = f"import torch; print(torch.load({str(path)!r}, weights_only=True)['classifier.bias'].device)"
    blind = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    assert subprocess.check_output([sys.executable, "-c", load], text=True, env=blind).strip() == "cpu"
    loss, _ = evaluate(load_model(path, CONFIG, IMAGES.classes), evaluation_batches(IMAGES, "val", CPU))
    assert loss == pytest.approx(first.loss, rel=0.05)


def test_gpu_without_bfloat16(replays: list, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(CONFIG)
    replays.clear()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    result = run(CONFIG)
    assert replays
    assert result.notes == []
    assert result.reports[0].train_loss == pytest.approx(expected.reports[0].train_loss, rel=0.05)
    assert torch.isfinite(result.after).all()


def test_trials_in_a_row_leave_no_memory_taken(tmp_path: Path) -> None:
    def stop(news: dict) -> None:
        if [metrics["epoch"] for metrics in news["reports"]] == [1]:
            raise SystemExit

    def trial(folder: Path) -> None:
        with contextlib.suppress(SystemExit):  # pytest would keep it, and with it the trial's frames
            run_trial(CONFIG, IMAGES, folder, ACCURACY, 0, (), stop, GPU)

    gc.disable()  # nothing may have to wait for it
    taken = []
    try:
        for i in range(10):
            thread = threading.Thread(target=trial, args=(tmp_path / str(i),))  # Tune starts one per trial, too
            thread.start()
            thread.join()
            assert list((tmp_path / str(i)).glob("weights_*"))
            torch.cuda.synchronize()
            taken.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    finally:
        gc.enable()
    assert taken[-1][0] <= taken[1][0]
    assert taken[-1][1] <= 1.1 * taken[1][1]


def test_out_of_memory_is_a_sentence_and_the_next_trial_trains() -> None:
    large = CONFIG | {"h_1": 256, "h_2": 2048, "batch_size": 3000}
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        with pytest.raises(torch.OutOfMemoryError) as error:
            run(large, make_synthetic(num_train=5000, num_test=10, num_classes=5))
        text = "Failure # 1 (occurred at)\n" + "".join(traceback.format_exception(error.value))
        sentence = "out of memory with batch_size 3000, h_1 256, h_2 2048; reduce these"
        assert error_sentence(text, large).startswith(sentence)
        del error
        result = run(CONFIG)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(result.reports) == 3
    assert result.notes == []


def test_two_trials_share_the_gpu_through_a_search(tmp_path: Path) -> None:
    flags = ["--quick", "--gpus-per-trial", "0.5", "--scheduler", "none", "--max-epochs", "60"]
    script = "import sys, hparam_search as it; it.PATIENCE = 60; sys.exit(it.main(sys.argv[1:]))"  # starts its own Ray
    command = [sys.executable, "-c", script, *flags, "--output-dir", str(tmp_path), "--name", "it"]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    assert {row["status"] for row in read_csv(tmp_path / "it")} == {"TERMINATED"}
    log, _ = read_lines(tmp_path / "it" / "log.jsonl")
    first, last = ({e["trial"]: e for e in lines if e["event"] == "reported"} for lines in (log[::-1], log))
    spans = sorted((first[name]["time"] - first[name]["seconds"], last[name]["time"]) for name in first)
    assert any(start < end for (_, end), (start, _) in itertools.pairwise(spans))  # two at once
    assert torch.load(tmp_path / "it" / "best_model" / "weights.pt", weights_only=True)["classifier.bias"].is_cpu


def test_trials_without_a_gpu_train_on_the_cpu(tmp_path: Path) -> None:
    flags = ["--quick", "--num-samples", "1", "--max-epochs", "1", "--cpus-per-trial", "1", "--output-dir"]
    command = [sys.executable, "hparam_search.py", *flags, str(tmp_path), "--name", "sees none"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}) as process:
        assert main([*flags, str(tmp_path), "--name", "given none", "--gpus-per-trial", "0"]) == 0
    assert process.returncode == 0
    assert figures(tmp_path / "given none") == figures(tmp_path / "sees none")  # to the last digit
