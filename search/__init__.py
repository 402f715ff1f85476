"""The parts of a search. This file sets the environment that Ray reads, mostly when it is imported."""

import os
import tempfile


def cluster_address() -> str | None:
    """Return the address of the Ray cluster to join, from RAY_ADDRESS; None to start a local Ray."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


# A user in a container may have no home, without which Ray cannot be imported.
if os.path.expanduser("~") == "~":  # noqa: PTH111
    os.environ["HOME"] = tempfile.gettempdir()
os.environ |= {
    "RAY_AIR_NEW_OUTPUT": "0",  # no box about Ray's own folder
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # a search is resumed from its own log and training states
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the recorder says in a sentence why a trial failed
    "RAY_ENABLE_AUTO_CONNECT": "0",  # so that no call after Ray's shutdown starts a new one
}
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "16")  # Tune's default with a search algorithm is 1
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")  # a worker's next trial waits for the last one's thread
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to Ray's developers
if not cluster_address():
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listen only on the loopback interface
