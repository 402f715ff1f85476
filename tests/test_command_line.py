import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import data
import hparam_search
from hparam_search import main
from tests.conftest import REPOSITORY, SMALL_IMAGES

BAD_COMMANDS = [
    (["--no-such-flag"], "--no-such-flag"),
    (["--dataset", "mnist"], "mnist"),
    (["--num-samples", "many"], "many"),
    (["--num-samples", "0"], "--num-samples is 0"),
    (["--max-epochs", "-1"], "--max-epochs is -1"),
    (["--seed", "-1"], "--seed is -1"),
    (["--cpus-per-trial", "0"], "--cpus-per-trial is 0"),
    (["--cpus-per-trial", "100000"], "this machine has"),
    (["--gpus-per-trial", "100"], "this machine has"),
    (["--gpus-per-trial", "1.5"], "--gpus-per-trial is 1.5"),
    (["--gpus-per-trial", "nan"], "--gpus-per-trial is nan"),
    (["--dataset", "synthetic", "--data-dir", "here"], "--data-dir here cannot be combined"),
    (["--resume", "nowhere"], "holds no search"),
    (["--resume", "nowhere", "--seed", "1"], "reuses the settings of the original search; remove --seed"),
    (["--name", "../up"], "--name is '../up'"),
    (["--name", ".."], "--name is '..'"),
    (["--name", "a\nb"], "--name is"),
    (["--quick", "--name", "taken"], "--name taken is taken"),
    (["--quick", "--output-dir", "file"], "choose another --output-dir"),
    (["--dataset", "folder", "--data-dir", "nowhere"], "train is not a folder"),
    (["--list", "--seed", "1"], "--list only accepts --output-dir; remove --seed"),
    (["--list", "--resume", "it"], "remove --resume"),
    (["--data-dir", "broken"], "fails its MD5 checksum"),
    (["--search", "grid"], "grid"),
    (["--resume", "nowhere", "--search", "random"], "remove --search"),
    (["--scheduler", "pbt"], "pbt"),
    (["--grace-period", "0"], "--grace-period is 0"),
    (["--quick", "--grace-period", "5"], "--grace-period is 5, but trials end after 4 epochs"),
    (["--reduction-factor", "1"], "--reduction-factor is 1"),
    (["--brackets", "0"], "--brackets is 0"),
    (["--scheduler", "none", "--grace-period", "2"], "--grace-period 2 cannot be combined with --scheduler none"),
    (["--scheduler", "median", "--brackets", "2"], "--brackets 2 cannot be combined with --scheduler median"),
    (["--repeats", "1"], "--repeats is 1, but must be at least 2"),
    (["--time-budget", "30"], "invalid duration '30' (use e.g. 90s, 30m or 2h)"),
    (["--time-budget", "-1h"], "--time-budget"),
]


@pytest.mark.parametrize(("argv", "words"), BAD_COMMANDS)
def test_bad_commands_are_refused_in_one_sentence(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hparam_search, "running_ray", lambda: pytest.fail("Ray was started"))
    monkeypatch.setattr(hparam_search, "QUICK_IMAGES", SMALL_IMAGES)
    (tmp_path / "outputs" / "taken").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cifar-100-python.tar.gz").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("hparam_search.py: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


class Started(Exception):
    """What running_ray raises in place of starting Ray: the input was good."""


def refuse_to_start() -> None:
    raise Started


ODD_STRINGS = ["", " ", ".", "..", "../x", "/", "a/b", "a\\b", "a\nb", "\0", "\x1b[2J", "ä" * 150, "x" * 300, "-1", "0",
               "1", "2", "1e9", "nan", "inf", "-inf", "1.5", "0x10", "9" * 30, "9" * 5000, "None", "--", "-", "~",
               "$HOME",               "\ud800", "name", "name.json", "train", "🙂", "synthetic",
               "folder", "cifar100", "file", "images", "loop",
               "locked", "search"]  # fmt: skip


FLAGS = ["--dataset", "--data-dir", "--output-dir", "--name", "--num-samples", "--max-epochs", "--seed",
         "--cpus-per-trial", "--gpus-per-trial", "--scheduler", "--grace-period", "--reduction-factor", "--brackets",
         "--search", "--time-budget", "--repeats", "--quick", "--resume", "--list", "--data", "-q", "--"]  # fmt: skip


SENSIBLE = {"--dataset": ["synthetic", "folder"], "--data-dir": ["images"], "--num-samples": ["1", "3"],
            "--max-epochs": ["1", "50"], "--seed": ["0", "7"], "--output-dir": ["out", "a/b/c"], "--name": ["it"],
            "--cpus-per-trial": ["1"], "--gpus-per-trial": ["0"], "--scheduler": ["asha", "median", "none"],
            "--grace-period": ["1", "2"], "--reduction-factor": ["1.5"], "--time-budget": ["90s", "2h"],
            "--search": ["random", "optuna"], "--resume": ["search", "damaged"]}  # fmt: skip


def test_any_command_line_ends_in_a_start_or_a_sentence(
    make_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    images = make_folder({"train": {"a": 5, "b": 5}, "test": {"a": 1}})
    monkeypatch.chdir(tmp_path)
    small = data.make_synthetic(**SMALL_IMAGES)
    monkeypatch.setattr(data, "make_synthetic", lambda **_: small)
    monkeypatch.setattr(data, "load_cifar100", data.load_folder)  # which is as picky, and quick
    monkeypatch.setattr(hparam_search, "running_ray", refuse_to_start)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "locked").mkdir(mode=0o500)
    (tmp_path / "images").mkdir()
    for split in ("train", "test"):
        (images / split).rename(tmp_path / "images" / split)
    for name, text in {"search": "{}", "damaged": '{"settings": {"name"', "name.json": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "search.json").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    generator, started = random.Random(0), 0
    for _ in range(1200):
        argv = []
        for flag in generator.sample(FLAGS, generator.randrange(5)):
            odd = flag not in SENSIBLE or generator.random() < 0.2
            value = generator.choice(ODD_STRINGS if odd else SENSIBLE[flag])
            argv += generator.choice([[flag, value], [flag, value], [f"{flag}={value}"], [flag]])
        begin = time.monotonic()
        try:
            code = main(argv)
        except SystemExit as end:  # of --help alone, which argparse prints
            code = end.code
        except Started:
            started += 1
            continue
        finally:
            printed = capsys.readouterr().err
            assert time.monotonic() - begin < 10, argv
        assert sorted(tmp_path.rglob("*")) == before, argv
        if "--list" in argv and code == 0:
            continue
        assert code == 2, (argv, code)
        assert printed.startswith("hparam_search.py: "), (argv, printed)
        assert printed.rstrip("\n").endswith("."), (argv, printed)
    assert 20 < started < 1180


def test_help_and_refusals_wait_for_no_import(tmp_path: Path) -> None:
    for name in ("torch", "ray", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    for argv, code, words in ((["--help"], 0, "--resume PATH"), (["--seed", "-1"], 2, "--seed is -1, but")):
        script = [sys.executable, str(REPOSITORY / "hparam_search.py"), *argv]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        result = subprocess.run(script, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == code
        assert words in result.stdout + result.stderr
