"""How the script starts: it answers bad flags at once, and imports itself, which takes seconds, while Ray starts."""

import contextlib
import importlib
import os
import sys
import threading
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from search.console import result_of, run_program, start_thread
from search.settings import PROGRAM, parse_args


def import_in_thread(module: str) -> Future:
    """Import a module in a thread, as Python loses a signal that comes while the lock of an import is released."""
    return start_thread(partial(importlib.import_module, module))


def launch(script: str, description: str) -> int:
    """Import a script's module, run its run_command, and return the exit code (see run_program)."""
    importing = None

    def work() -> int:
        nonlocal importing
        settings, _ = parse_args(None, description)
        ray_runtime = result_of(import_in_thread("search.ray_runtime"))
        folder = Path(settings.resume or Path(settings.output_dir, settings.name or ""))
        needed = not settings.list and not (folder / "best_model").exists()  # otherwise, there may be nothing to train
        with ray_runtime.running_ray(settings) if needed else contextlib.nullcontext():
            importing = import_in_thread(Path(script).stem)
            ray_runtime.wait_for_ray()
            return result_of(importing).run_command()

    code = run_program(PROGRAM, work)
    if any(thread.name in ("starts Ray",) for thread in threading.enumerate()) or (importing and not importing.done()):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # Python's exit would wait for them
    return code
