"""All GPU measurements, part by part.

python -m benchmarks.gpu --data-dir data/cifar10

If GPU time is short, split it into several calls (search-1 runs in two, as the GPUs may differ):

python -m benchmarks.gpu --seconds 400 --data-dir CIFAR10 --output-dir FIGURES
python -m benchmarks.gpu --seconds 300 --data-dir CIFAR10 --output-dir FIGURES search-1 search-2 throughput
python -m benchmarks.gpu --seconds 260 --data-dir CIFAR10 --output-dir FIGURES recipes

Each part runs in its own process with a time limit, and its output goes to a file; if one fails or times out, this is
reported and the next one starts. The tables are shown and saved in table.md. Without a GPU the same parts do less, to
try out this script. The images come from a folder (e.g. CIFAR-10).
"""

import argparse
import contextlib
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

from benchmarks import print_header, print_row
from benchmarks.throughput import WIDTHS, example_config, seconds_of, steps_alone, take
from data import make_synthetic, usable_cpus
from search.files import read_lines
from train import EAGER_STEPS, TrainStep, best_device, new_training, train_epochs

DEVICE = best_device()
ON_GPU = DEVICE.type == "cuda"
STEPS = 100 if ON_GPU else 2  # per smoke-test epoch, and per profile
KERNELS_SHOWN = 16
LINES_SHOWN = 25  # if a part fails or prints no table


def smoke() -> None:
    """Train two short epochs of each pair of widths: a quick check for anything slow or missing."""
    launched, replay = [], torch.cuda.CUDAGraph.replay
    torch.cuda.CUDAGraph.replay = lambda graph: launched.append(replay(graph))
    print_header("smoke", "images/s", f"replays (of {2 * STEPS - EAGER_STEPS})", "notes")
    for h_1, h_2 in WIDTHS:
        config = example_config(h_1, h_2) | {"epochs": 2}
        dataset = make_synthetic(num_train=STEPS * config["batch_size"] * 5 // 4, num_test=8, num_classes=8)
        training = new_training(config, 8, DEVICE)
        launched.clear()
        *_, last = train_epochs(training, config, dataset, DEVICE)
        print_row(f"{h_1}/{h_2}", last.images_per_second, len(launched), training.notes)


def profile(h_1: int, h_2: int) -> None:
    """Print the slowest kernels of the step alone, as a CUDA graph and eager."""
    activity = torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU
    key = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    images = make_synthetic(num_train=80, num_test=8, num_classes=8)
    ways = {"CUDA graph": TrainStep.replay} if ON_GPU else {}
    ways |= {"eager": TrainStep.descend}
    steps = {way: steps_alone(example_config(h_1, h_2), images, DEVICE) for way in ways}
    print_header("kernel", "µs/step", "launches/step")
    for way in ways:  # before the profiler slows down the launches
        TrainStep.replay = ways[way]
        take(steps[way], 10 if ON_GPU else 1)
        seconds = seconds_of(lambda way=way: take(steps[way], STEPS), DEVICE)
        print_row(f"**{h_1}/{h_2} {way}**, wall time", 1e6 * seconds / STEPS, "")
    for way in ways:
        TrainStep.replay = ways[way]
        with torch.profiler.profile(activities=[activity]) as profiler:
            seconds_of(lambda way=way: take(steps[way], STEPS), DEVICE)
        times = {event: getattr(event, key) / STEPS for event in profiler.key_averages()}
        print_row(f"**{h_1}/{h_2} {way}**, sum of kernels", sum(times.values()), "")
        for event in sorted(times, key=times.get, reverse=True)[:KERNELS_SHOWN]:
            print_row(f"`{event.key[:90].replace('|', '/')}`", times[event], event.count / STEPS)


def quick() -> None:
    """Run the quick search, and print how long it took to its first epoch and to its end."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        command = [sys.executable, "hparam_search.py", "--quick", "--output-dir", folder, "--name", "it"]
        subprocess.run(command, check=True)
        end = time.time()
        events, _ = read_lines(Path(folder, "it", "log.jsonl"))
        first = next(event["time"] for event in events if event["event"] == "reported")
    print_row("a quick search", f"first epoch after {first - start:.1f} s, end after {end - start:.1f} s")


def parts(data_dir: str, output: Path) -> dict[str, tuple[int, list[str]]]:
    """Return name → (time limit in seconds, Python arguments) of all parts, in order."""

    def own(call: str) -> list[str]:
        return ["-c", f"from benchmarks import gpu; gpu.{call}"]

    throughput = ["-m", "benchmarks.throughput", *(["--rounds", "3"] if ON_GPU else ["--rounds", "1", "--steps", "1"])]
    images = ["--dataset", "folder", "--data-dir", data_dir]
    search = ["-m", "benchmarks.search", *(images if ON_GPU else ["--num-samples", "1", "--max-epochs", "2"])]
    search += ["--no-baseline", "--at-once"]
    few = ["--dataset", "synthetic", "--classes", "2", "--images", "40", "--samples", "1", "--epochs", "1"]
    curves = ["-m", "benchmarks.curves", "--recipe", "default", "--output", str(output / "curves")]
    curves += [*images, "--samples", "2"] if ON_GPU else few
    recipes = ["-m", "benchmarks.recipes", "default", "--reference", "former", "--output", str(output / "recipes.csv")]
    tiny = ["--dataset", "synthetic", "--classes", "2", "--widths", "4", "4", "--epochs", "1"]
    recipes += ["--data-dir", data_dir, "--epochs", "20", "--seeds", "6"] if ON_GPU else tiny
    return {
        "smoke": (60, own("smoke()")),
        "tests": (200, ["-m", "pytest", "tests/test_gpu.py", "-v", "--tb=short", "--disable-warnings"]),
        "search-1": (180, [*search, "1"]),
        **{f"profile-{h_1}": (60, own(f"profile({h_1}, {h_2})")) for h_1, h_2 in WIDTHS},
        "throughput": (100, throughput),
        "quick": (80, own("quick()")),
        "search-2": (180, [*search, "2"]),
        "curves": (250, curves),
        "recipes": (250, recipes),
    }


def run(arguments: list[str], seconds: float, output: Path) -> str:
    """Run Python with a time limit, write its output to a file, and return how it ended."""
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # lets pytest report its results so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            return f"**timed out after {seconds:.0f} s**"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also kills its children
    return f"**failed (exit code {code})**" if code else "done"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts and show their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"parts to run (default: all): {' '.join(parts('', Path()))}")
    parser.add_argument("--data-dir", default="data/cifar10", help="image folder (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1200, help="total time limit (default: %(default)s)")
    parser.add_argument("--output-dir", help="folder for the output and table.md (default: a temporary one)")
    args = parser.parse_args(argv)
    folder = Path(args.output_dir or tempfile.mkdtemp())
    listed = parts(args.data_dir, folder)
    if unknown := set(args.parts) - set(listed):
        parser.error(f"no part is called {' or '.join(sorted(unknown))}")
    if ON_GPU and not Path(args.data_dir, "train").is_dir():
        parser.error(f"--data-dir {args.data_dir} has no subfolder train; pass an image folder, e.g. CIFAR-10")
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if ON_GPU else f"{platform.machine()} CPU, {usable_cpus()} cores"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(f"{device}; {versions}, Ray {ray.__version__}; all output goes to {folder}", flush=True)
    table = (folder / "table.md").open("w")
    end = time.monotonic() + args.seconds
    for name in args.parts or listed:
        seconds, arguments = listed[name]
        start = time.monotonic()
        if start >= end:
            print(f"\n{name}: no time left", flush=True)
            continue
        outcome = run(arguments, min(seconds, end - start), folder / f"{name}.txt")
        lines = (folder / f"{name}.txt").read_text(errors="replace").splitlines()
        shown = [line for line in lines if line.startswith("|")]
        if outcome != "done" or not shown:
            shown += lines[-LINES_SHOWN:]
        title = f"\n{name}: {outcome}, {time.monotonic() - start:.0f} s\n"
        for file in (sys.stdout, table):
            print(title, *shown, sep="\n", file=file, flush=True)


if __name__ == "__main__":
    main()
