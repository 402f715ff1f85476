"""How the script starts: it answers bad flags at once, and imports itself, which takes seconds, while Ray starts."""

import contextlib
import importlib
from pathlib import Path

from search.console import run_program
from search.ray_runtime import running_ray
from search.settings import PROGRAM, parse_args


def launch(script: str, description: str) -> int:
    """Import a script's module, run its run_command, and return the exit code (see run_program)."""

    def work() -> int:
        settings, _ = parse_args(None, description)
        folder = Path(settings.resume or Path(settings.output_dir, settings.name or ""))
        needed = not settings.list and not (folder / "best_model").exists()  # otherwise, there may be nothing to train
        with running_ray(settings) if needed else contextlib.nullcontext():
            return importlib.import_module(Path(script).stem).run_command()

    return run_program(PROGRAM, work)
