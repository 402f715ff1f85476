import contextlib
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from unittest.mock import patch

import pytest

import data
import hparam_search
from search import ray_runtime
from search.settings import Settings, flag, parse_args
from search.space import CONSTANTS
from tests.conftest import REPOSITORY
from tests.helpers import IMAGES

BAD_COMMANDS = {
    "--no-such-flag": "--no-such-flag; see --help", "--dataset mnist": "mnist", "--gpus-per-trial 1.5": "out of range",
    "--num-samples 0": "--num-samples 0 is too small; use at least 1", "--gpus-per-trial nan": "out of range",
    "--quick --grace-period 5": "--grace-period 5 exceeds the 4 epochs of a trial", "--reduction-factor 1": "least 1.1",
    "--scheduler none --grace-period 2": "--grace-period cannot be combined with --scheduler none",
    "--grace-period 0": "--grace-period 0 is too small; use at least 1", "--keep -1": "--keep -1 is too small",
    "--keep 3 --scheduler asha": "--keep cannot be combined with --scheduler asha; remove one of them",
    "--time-budget 30": "invalid duration '30' (use e.g. 90s, 30m or 2h)", "--time-budget=-1h": "duration '-1h'",
    "--dataset synthetic --data-dir here": "--data-dir cannot be combined with --dataset synthetic",
    "--dataset folder --data-dir nowhere": "nowhere/train is not a folder",
    "--quick --warm-start nowhere": "no search found in 'nowhere'", "--resume nowhere --warm-start x": "--warm-start",
    "--quick --warm-start outputs/taken": "no search found in 'outputs/taken'",
    "--quick --warm-start broken": "broken/search.json is damaged, or from another version",
    "--resume nowhere": "no search found in 'nowhere'", "--list --seed 1": "combined with --output-dir; remove --seed",
    "--resume nowhere --seed 1": "--num-samples, --repeats, --time-budget; remove --seed",
    "--name ../up": "invalid name '../up'", "--quick --name taken": "outputs/taken already exists",
    "--quick --name taken --or-resume": "outputs/taken already exists", "--or-resume": "--or-resume needs --name",
    "--output-dir s3://bucket/x": "'s3://bucket/x' is not a local folder; mount that storage",
    "--dataset folder --data-dir GS://b": "mount that storage", "--resume hdfs://host:8020/x": "mount that storage",
    "--quick --output-dir file": "is not a writable folder", "--repeats 1": "use at least 2",
}  # fmt: skip
ODD = ["", " ", ".", "..", "/", "a/b", "a\\b", "a\nb", "\0", "\x1b[2J", "ä" * 150, "x" * 300, "-1", "0", "1", "2",
       "1e9", "nan", "1.5", "0x10", "9" * 5000, "-", "~", "~nobody", "\ud800", "file", "loop", "broken"]  # fmt: skip
# Constants that may be None, 0 and 1.
OFF = {"PATIENCE", "MAX_SECONDS_PER_TRIAL", "SAVE_PERIOD", "MODELS_KEPT", "KEEP", "PROGRESS_PERIOD"}
ZERO = {"KEEP", "MIN_DELTA", "MAX_FAILURES_PER_TRIAL", "SAVE_PERIOD", "PROGRESS_PERIOD"}
ONE = set(CONSTANTS) - {"REDUCTION_FACTOR"}


def test_any_command_and_constant_starts_a_search_or_is_refused_in_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    for name in ("file", "outputs/taken/file", "broken/search.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_runtime, "running_ray", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(hparam_search.tuner, "share_resources", lambda *_: sys.exit(0))  # everything was accepted
    monkeypatch.setattr(data, "make_synthetic", lambda **_: IMAGES)
    generator, before = random.Random(0), sorted(tmp_path.rglob("*"))
    attempts = [(command.split(), {}, words, {2}) for command, words in BAD_COMMANDS.items()]
    for _ in range(800):
        name, value = flag(generator.choice(fields(Settings)).name), generator.choice(ODD)
        flags = generator.choice([[name], [name, value], [f"{name}={value}"]])
        attempts.append((["--quick", *flags], {}, "", {0, 1, 2}))
    for name in CONSTANTS:
        for value, good in ((None, OFF), (0, ZERO), (1, ONE), (-1, set()), (math.inf, set()), ("3", set())):
            words, code = ("", 0) if name in good else (f": {name} cannot be {value!r}; use ", 2)
            attempts.append((["--quick"], {name: value}, words, {code}))
    attempts.append((["--quick"], {"first_trials": [{"lr": 0.1}]}, "--quick ignores first_trials", {0}))
    codes = []
    for argv, constants, words, expected in attempts:
        with patch.dict(vars(hparam_search), constants):
            codes.append(hparam_search.main(argv))
        err = capfd.readouterr().err
        assert codes[-1] in expected, (argv, constants, err)
        assert words in err, (argv, constants, err)
        flags = 0 if words else re.DOTALL  # an odd value may have line breaks of its own
        assert not codes[-1] or re.fullmatch(r"hparam_search.py: .*\.\n", err, flags), (argv, err)
        assert sorted(tmp_path.rglob("*")) == before, argv
    assert codes[: len(BAD_COMMANDS) + 800].count(0) > 50


def test_help_and_refusals_wait_for_no_slow_import(tmp_path: Path) -> None:
    for name in ("torch", "ray", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    for flags, code, words in ((["--help"], 0, "--resume PATH"), (["--seed", "-1"], 2, "--seed -1 is too small")):
        command = [sys.executable, REPOSITORY / "hparam_search.py", *flags]
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}  # without the script's folder
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (result.returncode, words in result.stdout + result.stderr) == (code, True)


def test_flags_for_another_search_give_it_the_same_images_epochs_and_draws() -> None:
    for command in (
        "", "--quick", "--quick --num-samples 2", "--quick --num-samples 6 --seed 1 --max-epochs 3",
        "--dataset folder --data-dir here --num-samples 2", "--dataset synthetic --output-dir there",
    ):  # fmt: skip
        settings, _ = parse_args(command.split(), "")
        assert parse_args(settings.source_flags(), "")[0] == settings
        other, _ = parse_args([*command.split(), "--keep", "3", "--name", "it", "--repeats", "2"], "")
        assert other.source_flags() == settings.source_flags()
    assert settings.source_flags() == ["--dataset", "synthetic", "--output-dir", str(Path.cwd() / "there")]
    assert parse_args(["--output-dir", "file:///a%20b/c"], "")[0].output_dir == "/a b/c"
