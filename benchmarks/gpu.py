"""All that is to be measured on a GPU, in order, as a table.

python -m benchmarks.gpu --data-dir data/cifar10

Each part runs as a process of its own with a time limit; one that fails, or takes too long, is told, and the next goes
on. Parts can be named, for all together take some 15 minutes: `python -m benchmarks.gpu tests quick throughput`. With
no GPU the same parts run with the quick search, to try this script out. The images are a folder's (CIFAR-10, say).
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import ray
import torch
import torchvision

import hparam_search
from benchmarks.throughput import WIDTHS
from data import make_synthetic, usable_cpus
from train import best_device, new_training, train_epochs

PYTHON = sys.executable
PROFILED_STEPS = 200
SHARES = (1, 2, 3, 4)  # trials at once


def run(command: list[str], seconds: float) -> list[dict]:
    """Run a command for so long at most, show what it prints, and return its lines of JSON.

    Raises:
        RuntimeError: it fails, or takes too long.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"took more than {seconds:.0f} s") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it left running
    lines = output.splitlines()
    print(*lines[-30:], sep="\n", flush=True)
    if process.returncode:
        raise RuntimeError(f"ended with {process.returncode}")
    return [json.loads(line) for line in lines if line.startswith("{")]


def first_epoch(arguments: list[str], seconds: float) -> list[dict]:
    """Return how long a search takes from its command to the first epoch that a trial reports."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        command = [PYTHON, "hparam_search.py", *arguments, "--output-dir", folder, "--name", "it"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            while not any(path.stat().st_size for path in Path(folder).glob("it/*/result.json")):
                if process.poll() is not None or time.monotonic() - start > seconds:
                    raise RuntimeError(f"reported nothing within {time.monotonic() - start:.0f} s")
                time.sleep(0.05)
            taken = time.monotonic() - start
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return [{"seconds": taken}]


def profile(h_1: int, h_2: int) -> None:
    """Print, as JSON, where the time of an epoch's steps goes: the five kernels that take most, and their shares."""
    device = best_device()
    config = hparam_search.param_space | {"h_1": h_1, "h_2": h_2, "p_drop": 0.1, "lr": 0.01, "seed": 0, "epochs": 2}
    steps = PROFILED_STEPS if device.type == "cuda" else 3
    dataset = make_synthetic(num_train=steps * config["batch_size"] * 5 // 4, num_test=8, num_classes=8)
    epochs = train_epochs(new_training(config, 8, device), config, dataset, device)
    next(epochs)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        metrics = next(epochs)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    print(profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=80), file=sys.stderr)
    print(
        json.dumps(
            {
                "widths": f"{h_1}/{h_2}",
                "microseconds_a_step": total / steps,
                "wall_microseconds_a_step": 1e6 * config["batch_size"] / metrics["images_per_second"],
                "kernels": [
                    {"name": event.key, "share": getattr(event, key) / total, "launches": event.count / steps}
                    for event in events[:5]
                ],
                "gpu_mb": torch.cuda.max_memory_reserved() / 1e6 if device.type == "cuda" else None,
            }
        )
    )


def parts(data_dir: str, on_gpu: bool) -> dict[str, tuple]:
    """Return name → (seconds that it may take, command) of all parts, in order."""
    images = ["--dataset", "folder", "--data-dir", data_dir]
    search = [*images] if on_gpu else ["--num-samples", "1", "--max-epochs", "2"]
    rounds = ["--rounds", "5"] if on_gpu else ["--rounds", "1", "--steps", "1"]
    benchmark = [PYTHON, "-m", "benchmarks.search", "--json"]
    listed = {
        "tests": (200, [PYTHON, "-m", "pytest", "-m", "gpu"]),
        "quick": (120, [PYTHON, "hparam_search.py", "--quick", "--output-dir", tempfile.gettempdir()]),
        "first": (90, None),
        "throughput": (180, [PYTHON, "-m", "benchmarks.throughput", "--json", *rounds]),
    }
    for share in SHARES if on_gpu else (1, 2):
        listed[f"search-{share}"] = (240, [*benchmark, "--at-once", str(share), *search])
    listed["baseline"] = (300, [*benchmark, "--baseline-recipe", "--at-once", "1", *search])
    for h_1, h_2 in WIDTHS:
        command = [PYTHON, "-c", f"from benchmarks.gpu import profile; profile({h_1}, {h_2})"]
        listed[f"profile-{h_1}"] = (90, command)
    return listed


def rows(results: dict[str, list[dict]]) -> list[tuple[str, str, str]]:
    """Return (figure, aim, measured) of what the parts gave; of one that was not run, nothing."""
    found = []

    def add(figure: str, aim: str, measured: str) -> None:
        found.append((figure, aim, measured))

    for name, figure in (("tests", "tests of the GPU's own"), ("quick", "a quick search")):
        if name in results:
            add(figure, "pass", "pass")
    if "first" in results:
        add("from the command to the first epoch reported", "≤ 12 s", f"{results['first'][0]['seconds']:.1f} s")
    for widths in results.get("throughput", []):
        name = f"{widths['h_1']}/{widths['h_2']}"
        share = widths["validation_share"] + widths["checkpoint_share"]
        add(f"{name}: throughput ÷ the baseline's loop", "≥ 8 (64/512)", f"{widths['over_baseline']:.2f}")
        add(f"{name}: throughput ÷ the step alone", "≥ 0.95", f"{widths['over_step_alone']:.3f}")
        add(f"{name}: validation and checkpoint, share of an epoch", "≤ 0.15", f"{share:.3f}")
    for name, lines in results.items():
        if name.startswith(("search-", "baseline")):
            result, baseline = lines
            what = f"{result['at_once']} at once" + (", the baseline's recipe" if name == "baseline" else "")
            accuracies = f"{result['val_accuracy']:.4f}, {result['test_accuracy']:.4f}"
            add(f"search, {what}", "≤ 120 s", f"{result['seconds']:.0f} s, {result['epochs_spent']} epochs")
            add("— the baseline's loop ÷ it", "≥ 10", f"{baseline['over_baseline']:.1f}")
            add("— validation and test accuracy", "≥ 0.93, within 0.01", accuracies)
            if result["gpu_mb"]:
                add("— GPU busy, GPU memory", "", f"{result['gpu_busy']:.2f}, {result['gpu_mb']:.0f} MB")
            add("— memory of the driver, a worker", "", f"{result['driver_mb']:.0f} MB, {result['worker_mb']:.0f} MB")
        if name.startswith("profile-"):
            profiled = lines[0]
            add(
                f"{profiled['widths']}: a step, by kernels and by the clock",
                "",
                f"{profiled['microseconds_a_step']:.0f} µs, {profiled['wall_microseconds_a_step']:.0f} µs",
            )
            for kernel in profiled["kernels"]:
                add(f"— {kernel['name'][:70]}", "", f"{kernel['share']:.3f}, {kernel['launches']:.1f} a step")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, print the table, and return 1 if one failed, else 0."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"default all: {' '.join(parts('', on_gpu))}")
    parser.add_argument("--data-dir", default="data/cifar10", help="default %(default)s")
    parser.add_argument("--json", help="a file for the figures")
    args = parser.parse_args(argv)
    listed = parts(args.data_dir, on_gpu)
    if unknown := set(args.parts) - set(listed):
        parser.error(f"no part is called {' or '.join(sorted(unknown))}")
    results, failed = {}, {}
    for name in args.parts or listed:
        seconds, command = listed[name]
        print(f"--- {name}, {seconds} s at most", flush=True)
        start = time.monotonic()
        try:
            if command is None:
                images = ["--dataset", "folder", "--data-dir", args.data_dir] if on_gpu else ["--quick"]
                results[name] = first_epoch(images, seconds)
            else:
                results[name] = run(command, seconds)
        except (RuntimeError, OSError, ValueError) as error:
            failed[name] = str(error)
        print(f"--- {name}: {failed.get(name, 'done')}, {time.monotonic() - start:.0f} s\n", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(results))
    device = torch.cuda.get_device_name() if on_gpu else f"{platform.processor()} CPU, {usable_cpus()} cores"
    print(f"{device}; torch {torch.__version__}, torchvision {torchvision.__version__}, Ray {ray.__version__}\n")
    print("| figure | aim | measured |\n| --- | --- | --- |")
    for row in rows(results) + [(name, "", error) for name, error in failed.items()]:
        print(f"| {' | '.join(row)} |")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
