"""All GPU measurements, part by part.

python -m benchmarks.gpu --data-dir data/cifar10 --output-dir FIGURES
python -m benchmarks.gpu --data-dir data/cifar10 --output-dir FIGURES --parts tests throughput  # if GPU time is short

Each part runs in its own process with a time limit, and its output goes to a file, whose end is shown; if one fails or
times out, this is reported and the next one starts. Without a GPU the same parts do less, to try out this script. The
images come from a folder (e.g. CIFAR-10).
"""

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ray
import torch
import torchvision


def parts(data_dir: str, output: Path) -> dict[str, tuple[int, list[str]]]:
    """Return name → (time limit in seconds, Python arguments) of all parts, in order."""
    search = ["--dataset", "folder", "--data-dir", data_dir]
    halves, throughput, curves = ["--gpus-per-trial", "0.5"], [], [*search, "--samples", "2"]
    if not torch.cuda.is_available():
        search, halves = ["--quick", "--num-samples", "1", "--max-epochs", "2"], []
        throughput = ["--rounds", "1", "--steps", "1"]
        curves = ["--dataset", "synthetic", "--classes", "2", "--h-1", "4", "--h-2", "4"]
        curves += ["--samples", "1", "--epochs", "1"]
    return {
        "tests": (200, ["-m", "pytest", "tests/test_gpu.py", "-v", "--tb=short", "--disable-warnings"]),
        "throughput": (100, ["-m", "benchmarks.throughput", *throughput]),
        "search-1": (240, ["-m", "benchmarks.search", *search]),
        "search-2": (240, ["-m", "benchmarks.search", *search, *halves]),
        "quick": (80, ["hparam_search.py", "--quick", "--output-dir", str(output)]),
        "curves": (250, ["-m", "benchmarks.curves", *curves, "--output", str(output / "curves")]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts and show what each printed last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(parts("", Path()))
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="(default: all, in this order)")
    parser.add_argument("--data-dir", default="data/cifar10", help="image folder (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the output of all parts")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Ray {ray.__version__}"
    print(f"{device}; Python {platform.python_version()}, {versions}", flush=True)
    for name in args.parts:
        seconds, arguments = parts(args.data_dir, args.output_dir)[name]
        output, start = args.output_dir / f"{name}.txt", time.monotonic()
        command = ["timeout", "--signal=INT", "--kill-after=10", str(seconds), sys.executable, *arguments]
        with output.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        outcome = {0: "done", 124: "timed out", 137: "timed out"}.get(code, f"failed (exit code {code})")
        lines = output.read_text(errors="replace").splitlines()[-25:]
        print(f"\n{name}: {outcome}, {time.monotonic() - start:.0f} s\n", *lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
