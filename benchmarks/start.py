"""What a user waits for besides training: when each phase of a search begins, in seconds after the command.

python -m benchmarks.start --quick
python -m benchmarks.start --quick --rounds 5 --reference ../another_checkout    # in turn with another version

The other flags are those of hparam_search.py; --output-dir and --name are overridden. The figures are medians of the
rounds; the last two, from /proc and hence only on Linux, are peaks of the search's own process and of any worker.
"""

import argparse
import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import print_header, print_row
from search.files import read_lines

CHECKOUT = Path(__file__).resolve().parents[1]


def peak_memory(process: Path) -> float:
    """Return the peak memory, in MB, of a process, given its folder in /proc; 0 if it has ended."""
    with contextlib.suppress(OSError, TypeError):
        return int(re.search(r"VmHWM:\s+(\d+)", (process / "status").read_text())[1]) / 1000
    return 0.0


def measure(checkout: Path, flags: list[str]) -> dict[str, float]:
    """Run a search with a checkout's hparam_search.py, and return phase → seconds after the command, and memory."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "hparam_search.py", *flags, "--output-dir", folder, "--name", "it"]
        start, driver, worker = time.time(), 0.0, 0.0
        process = subprocess.Popen(command, cwd=checkout, stdout=sys.stderr)
        while process.poll() is None:
            driver = max(driver, peak_memory(Path("/proc", str(process.pid))))
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    if path.read_bytes().startswith(b"ray::"):
                        worker = max(worker, peak_memory(path.parent))
            time.sleep(0.1)
        end = time.time()
        if process.returncode:
            sys.exit(f"the search ended with exit code {process.returncode}")
        events, _ = read_lines(Path(folder, "it", "log.jsonl"))
    times: dict[str, list[float]] = {}
    for event in events:
        times.setdefault(event["event"], []).append(event["time"] - start)
    epoch = next(event["seconds"] for event in events if event["event"] == "reported")
    reported = times["reported"]
    phases = {"configs drawn": times["drawn"][-1], "first trial handed over": times["begun"][0]}
    phases |= {"first epoch reported": reported[0], "of that, its training": epoch, "last report": reported[-1]}
    phases |= {"trials stopped": times["stopped"][-1], "best model tested": times["tested"][-1]}
    phases |= {"prompt": end - start, "prompt after the last report": end - start - reported[-1]}
    return phases | {"memory of the search, MB": driver, "memory of a worker, MB": worker}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one or two checkouts in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--reference", type=Path, help="folder of another checkout")
    args, flags = parser.parse_known_args(argv)
    checkouts = [args.reference, CHECKOUT] if args.reference else [CHECKOUT]
    rounds = [[measure(checkout, flags) for checkout in checkouts] for _ in range(args.rounds)]
    print_header("phase", *(["reference", "this version", "ratio"] if args.reference else ["seconds"]))
    for phase in rounds[0][0]:
        figures = [statistics.median(found[i][phase] for found in rounds) for i in range(len(checkouts))]
        ratios = [statistics.median(after[phase] / before[phase] for before, after in rounds)] if args.reference else []
        print_row(phase, *figures, *ratios)


if __name__ == "__main__":
    main()
