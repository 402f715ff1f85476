import threading
from pathlib import Path

import pytest

from search.command_line import Settings
from search.progress import Progress
from search.records import Search, append_line, read_log, sealed, write_params
from search.trial_log import TrialLog, error_sentence
from tests.conftest import CONFIG, log_line


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("MemoryError", "out of memory with batch_size 64, h_1 4, h_2 8: make these smaller, or let fewer trials"),
        ("ray.exceptions.OutOfMemoryError: Task was killed", "out of memory with batch_size 64, h_1 4, h_2 8: make"),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you", "out of memory with batch_size 64"),
        ("RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be", "out of memory with batch_size 64"),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "out of memory"),
        ("RuntimeError: FIND was unable to find an engine to execute this computation", "out of memory with batch"),
        ("RuntimeError: GET was unable to find an engine to execute this computation", "out of memory with batch"),
        ("ValueError: the reason why\n", "ValueError: the reason why"),
    ],
)  # fmt: skip
def test_error_comes_down_to_a_sentence(text: str, sentence: str) -> None:
    # As Ray writes it, an attempt after the other.
    head = "Failure # {} (occurred at 2026-11-23_12-00-00)\nray::ImplicitFunc.train() (pid=1)\n  File ...\n"
    log = head.format(1) + "KeyError: another\n\n" + head.format(2) + text
    assert error_sentence(log, CONFIG | {"batch_size": 64}).startswith(sentence)


def test_error_of_a_process_that_died() -> None:
    log = "Failure # 1 (occurred at 2026-11-23_12-00-00)\nThe actor died unexpectedly.\n\tclass_name: X\n\tpid: 3\n"
    assert error_sentence(log, CONFIG) == "The actor died unexpectedly."
    assert error_sentence("", CONFIG) == "no reason is known"


def test_log_cut_short_is_written_on(tmp_path: Path) -> None:
    folder = tmp_path / "train_cifar_00000"
    write_params(folder, CONFIG)
    append_line(folder, sealed(log_line(1)) + "\nnoise\n" + sealed(log_line(2))[:-30])
    search = Search(tmp_path, Settings(), {}, {}, {}, {folder.name: CONFIG})
    log = TrialLog(search, 5, Progress(30), {}, threading.Event())
    log.append(folder.name, log_line(2))
    assert read_log(folder) == ([log_line(1), log_line(2)], 1)
