"""All that is to be measured on a GPU, part by part, as a table.

python -m benchmarks.gpu --data-dir data/cifar10

Where a GPU is lent by the quarter of an hour, in two calls:

python -m benchmarks.gpu --seconds 400 smoke tests profile throughput no-autotune quick search-1
python -m benchmarks.gpu --seconds 300 tests search-2 search-3 baseline

Each part runs as a process of its own with a time limit, and all it prints goes into a file; one that fails, or takes
too long, is told, and the next goes on. After each part the table grows. With no GPU the same parts run with less to
do, to try this script out. The images are a folder's (CIFAR-10, say).
"""

import argparse
import contextlib
import itertools
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

from benchmarks.throughput import WIDTHS, example_config, seconds_of, steps_alone, take
from data import make_synthetic, usable_cpus
from search.records import read_log
from train import TrainStep, best_device, new_training, train_epochs

DEVICE = best_device()
ON_GPU = DEVICE.type == "cuda"
STEPS = 100 if ON_GPU else 2  # of the smoke test's epochs, and profiled
LINES_SHOWN = 15  # of a part that failed


def smoke() -> None:
    """Train two short epochs of each pair of widths, and print a line of JSON: what is slow or missing shows here."""
    replays, replay = itertools.count(), torch.cuda.CUDAGraph.replay
    torch.cuda.CUDAGraph.replay = lambda graph: (next(replays), replay(graph))
    for h_1, h_2 in WIDTHS:
        config = example_config(h_1, h_2) | {"epochs": 2}
        dataset = make_synthetic(num_train=STEPS * config["batch_size"] * 5 // 4, num_test=8, num_classes=8)
        training = new_training(config, 8, DEVICE)
        before = next(replays)
        *_, last = train_epochs(training, config, dataset, DEVICE)
        figures = {"images_per_second": last["images_per_second"], "notes": training.notes}
        print(json.dumps({"widths": f"{h_1}/{h_2}", **figures, "replays": next(replays) - before - 1}), flush=True)


def profile() -> None:
    """Print, as JSON, where the time of steps alone goes, by graph and eagerly: the kernels that take most."""
    activity = torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU
    key = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    replay = TrainStep.replay
    for (h_1, h_2), eagerly in itertools.product(WIDTHS, (False, True) if ON_GPU else (True,)):
        TrainStep.replay = TrainStep.descend if eagerly else replay
        steps = steps_alone(example_config(h_1, h_2), make_synthetic(num_train=80, num_test=8, num_classes=8), DEVICE)
        take(steps, 10 if ON_GPU else 1)
        clock = seconds_of(lambda steps=steps: take(steps, STEPS), DEVICE)
        with torch.profiler.profile(activities=[activity]) as profiler:
            seconds_of(lambda steps=steps: take(steps, STEPS), DEVICE)
        events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
        total = sum(getattr(event, key) for event in events)
        print(profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90))
        kernels = [
            {"name": event.key, "share": getattr(event, key) / total, "launches": event.count / STEPS}
            for event in events[:8]
        ]
        figures = {"clock": 1e6 * clock / STEPS, "kernels": total / STEPS, "most": kernels}  # microseconds a step
        print(
            json.dumps({"widths": f"{h_1}/{h_2}", "how": "eagerly" if eagerly else "by graph", **figures}), flush=True
        )


def quick() -> None:
    """Run the quick search, and print, as JSON, how long it took to its first epoch and to its end."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        command = [sys.executable, "hparam_search.py", "--quick", "--output-dir", folder, "--name", "it"]
        subprocess.run(command, check=True)
        end = time.time()
        first = min(read_log(path.parent)[0][0]["time"] for path in Path(folder).glob("it/*/result.json"))
    print(json.dumps({"first": first - start, "end": end - start}))


def parts(data_dir: str) -> dict[str, tuple[int, list[str]]]:
    """Return name → (seconds that it may take, arguments of Python) of all parts, in order."""
    of_this_file = {name: ["-c", f"from benchmarks import gpu; gpu.{name}()"] for name in ("smoke", "profile", "quick")}
    throughput = ["-m", "benchmarks.throughput", "--json", *([] if ON_GPU else ["--steps", "1"])]
    throughput += ["--rounds", "3" if ON_GPU else "1"]
    images = ["--dataset", "folder", "--data-dir", data_dir]
    search = ["-m", "benchmarks.search", "--json", *(images if ON_GPU else ["--num-samples", "1", "--max-epochs", "2"])]
    others = [*search, "--no-baseline", "--at-once"]
    return {
        "smoke": (60, of_this_file["smoke"]),
        "tests": (150, ["-m", "pytest", "tests/test_gpu.py", "--tb=short", "-rA"]),
        "profile": (90, of_this_file["profile"]),
        "throughput": (100, throughput),
        "no-autotune": (60, [*throughput, "--no-autotune", "--no-baseline"]),
        "quick": (80, of_this_file["quick"]),
        "search-1": (200, [*search, "--at-once", "1"]),
        "search-2": (150, [*others, "2"]),
        "search-3": (150, [*others, "3"]),
        "baseline": (250, [*others, "1", "--baseline-recipe"]),
    }


def run(arguments: list[str], seconds: float, output: Path) -> list[dict]:
    """Run Python for so long at most, its output into a file, and return the lines of JSON that it printed.

    Raises:
        RuntimeError: it fails, or takes too long.
    """
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"took more than {seconds:.0f} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it left running
    lines = output.read_text(errors="replace").splitlines()
    if code:
        print(*lines[-LINES_SHOWN:], sep="\n")
        raise RuntimeError(f"ended with {code}")
    return [json.loads(line) for line in lines if line.startswith("{")]


def rows(name: str, lines: list[dict]) -> list[tuple[str, str, str]]:
    """Return (figure, aim, measured) of what a part printed."""
    if name == "smoke":
        aim = f"{2 * STEPS - 3 if ON_GPU else 0} replays, no notes"
        return [
            (f"smoke, {each['widths']}", aim, f"{each['images_per_second']:.0f} images/s, {each['replays']} replays, "
                f"notes: {each['notes']}") for each in lines
        ]  # fmt: skip
    if name == "tests":
        return [("tests of the GPU's own", "pass", "pass")]
    if name == "quick":
        return [
            ("from the command to the first epoch reported", "≤ 12 s", f"{lines[0]['first']:.1f} s"),
            ("a quick search", "", f"{lines[0]['end']:.1f} s"),
        ]
    found = []
    for each in lines:
        if name == "profile":
            figures = f"{each['clock']:.0f} µs, {each['kernels']:.0f} µs"
            found.append((f"{each['widths']}, {each['how']}: a step by the clock, by its kernels", "", figures))
            for kernel in each["most"]:
                figures = f"{kernel['share']:.3f}, {kernel['launches']:.1f} a step"
                found.append((f"— {kernel['name'][:70].replace('|', '/')}", "", figures))
        elif name in ("throughput", "no-autotune"):
            what = f"{each['h_1']}/{each['h_2']}" + (", cuDNN's choice untimed" if name == "no-autotune" else "")
            images = " ".join(f"{rate:.0f}" for rate in each["images_per_second"]["search"])
            found.append((f"{what}: images/s", "", images))
            found.append((f"{what}: ÷ the step alone", "≥ 0.95", f"{each['over_step_alone']:.3f}"))
            if each["over_baseline"]:
                share = each["validation_share"] + each["checkpoint_share"]
                found.append((f"{what}: ÷ the baseline's loop", "≥ 8 (64/512)", f"{each['over_baseline']:.2f}"))
                found.append((f"{what}: validation and checkpoint, share of an epoch", "≤ 0.15", f"{share:.3f}"))
        elif "baseline_seconds" in each:
            found.append(("— the baseline's loop ÷ it", "≥ 10", f"{each['over_baseline']:.1f}"))
        else:
            what = f"search, {each['at_once']} at once" + (", the baseline's recipe" if name == "baseline" else "")
            accuracies = f"{each['val_accuracy']:.4f}, {each['test_accuracy']:.4f}"
            found.append((what, "≤ 100 s", f"{each['seconds']:.0f} s, {each['epochs_spent']} epochs"))
            found.append(("— validation and test accuracy", "≥ 0.93, within 0.01", accuracies))
            if each["gpu_mb"]:
                found.append(("— GPU busy, GPU memory", "", f"{each['gpu_busy']:.2f}, {each['gpu_mb']:.0f} MB"))
            memory = f"{each['driver_mb']:.0f} MB, {each['worker_mb']:.0f} MB"
            found.append(("— memory of the driver, a worker", "", memory))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, print the table, and return 1 if one failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"default all: {' '.join(parts(''))}")
    parser.add_argument("--data-dir", default="data/cifar10", help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=1200, help="that all may take together; default %(default)s")
    parser.add_argument("--output-dir", help="for what the parts print, and the table; default a temporary folder")
    args = parser.parse_args(argv)
    listed = parts(args.data_dir)
    if unknown := set(args.parts) - set(listed):
        parser.error(f"no part is called {' or '.join(sorted(unknown))}")
    folder = Path(args.output_dir or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if ON_GPU else f"{platform.processor()} CPU, {usable_cpus()} cores"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    table = [f"{device}; {versions}, Ray {ray.__version__}", "", "| figure | aim | measured |", "| --- | --- | --- |"]
    print(table[0], f"Output of the parts: {folder}", sep="\n", flush=True)
    end, failed = time.monotonic() + args.seconds, False
    for name in args.parts or listed:
        seconds, arguments = listed[name]
        start = time.monotonic()
        try:
            new = rows(name, run(arguments, max(0, min(seconds, end - start)), folder / f"{name}.txt"))
        except (RuntimeError, OSError, ValueError, LookupError) as error:
            new, failed = [(name, "", f"failed: {error!r}")], True
        new = [f"| {' | '.join(row)} |" for row in new]
        table += new
        (folder / "table.md").write_text("\n".join(table) + "\n")
        print(f"--- {name}, {time.monotonic() - start:.0f} s", *new, sep="\n", flush=True)
    print("", *table, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
