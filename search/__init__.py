"""The parts of a search; this file does what must precede all other imports."""

import os
import sys
import tempfile

from search.settings import cluster_address

# Otherwise the next file opened would get a closed stream's descriptor, and with it what libraries print.
for stream in ("stdin", "stdout", "stderr"):
    if getattr(sys, stream) is None:
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(nowhere, True)
        setattr(sys, stream, os.fdopen(nowhere, "r" if stream == "stdin" else "w"))

# A container's user may have no home, without which Ray cannot be imported.
if os.path.expanduser("~") == "~":  # noqa: PTH111
    os.environ["HOME"] = tempfile.gettempdir()

# Environment variables, which Ray reads when it is imported.

# In its newer output, Ray shows a box about its own folder whatever verbose says.
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
# A search is resumed from its trials' own logs and checkpoints, so Ray need not write any.
os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "inf"
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
# So many processes start at once. Tune's default, where it does not draw the trials itself, is one after the other.
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "16")
# What failed is said in a sentence as it happens, and in full in the trial's folder.
os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
# A Ray of our own listens on the loopback alone, as it does by itself on macOS.
if not cluster_address():
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# The results are local: no reports to Ray's makers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A call from an abandoned thread after Ray's shutdown must not start a new Ray.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
# Ray would say that it leaves .git behind; which files go to the nodes of a cluster, ray_session says.
os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
