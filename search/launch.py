"""How the script starts: it answers bad flags at once, and imports itself, which takes seconds, while Ray starts."""

import contextlib
import importlib
import os
import sys
import threading
from functools import partial
from pathlib import Path

from search.console import result_of, run_program, start_thread
from search.settings import PROGRAM, parse_args


def launch(script: str, description: str) -> int:
    """Import a script's module, run its run_command, and return the exit code (see run_program)."""
    imports = []  # in threads, as Python may lose a signal that comes during an import

    def work() -> int:
        settings, _ = parse_args(None, description)
        imports.append(start_thread(partial(importlib.import_module, "search.ray_runtime")))
        ray_runtime = result_of(imports[-1])
        folder = Path(settings.resume or Path(settings.output_dir, settings.name or ""))
        needed = not settings.list and not (folder / "best_model").exists()  # otherwise, there may be nothing to train
        with ray_runtime.running_ray(settings) if needed else contextlib.nullcontext():
            imports.append(start_thread(partial(importlib.import_module, Path(script).stem)))
            ray_runtime.wait_for_ray()
            return result_of(imports[-1]).run_command()

    code = run_program(PROGRAM, work)
    if not all(each.done() for each in imports) or "Ray" in [thread.name for thread in threading.enumerate()]:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # Python's own exit would wait for what a signal has interrupted
    return code
