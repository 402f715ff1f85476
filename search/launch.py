"""How the script starts: it answers bad flags at once, and imports itself, which takes seconds, while Ray starts."""

import contextlib
import importlib
import os
import sys
import threading
from functools import partial
from pathlib import Path

from search.console import run_in_thread, run_program
from search.settings import PROGRAM, parse_args


def launch(script: str, description: str) -> int:
    """Import a script's module, run its run_command, and return the exit code (see run_program)."""

    def work() -> int:
        settings, _ = parse_args(None, description)
        from search.ray_runtime import running_ray  # not before, as it imports Ray

        folder = Path(settings.resume or Path(settings.output_dir, settings.name or ""))
        needed = not settings.list and not (folder / "best_model").exists()  # otherwise, there may be nothing to train
        with running_ray(settings) if needed else contextlib.nullcontext():
            # Not here: Python loses an interrupt if it comes while a lock for imports is released.
            module = run_in_thread(partial(importlib.import_module, Path(script).stem), threading.Event())
            return module.run_command()

    code = run_program(PROGRAM, work)
    if threading.active_count() > 1 and any(thread.name == "abandoned" for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)  # Ray's own cleanup would wait for the thread that still starts it
    return code
