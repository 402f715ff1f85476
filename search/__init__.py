"""The machinery of a search, a room a question; here, what Ray is told through its environment.

Ray reads it when it is imported, so the first thing that hparam_search.py imports is this package.
"""

import os

# In its newer output, Ray shows a box about its own folder whatever verbose says.
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
# Here every signal is handled alike: see signals.py.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
# A search is resumed from its trials' own logs and checkpoints, so Ray need not write any.
os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "inf"
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
# So many processes start at once. Tune's default, where it does not draw the trials itself, is one after the other.
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "16")
# What failed is said in a sentence as it happens, and in full in the trial's folder.
os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
# A Ray of our own listens on the loopback alone, as it does by itself on macOS.
if "RAY_ADDRESS" not in os.environ:
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# The results are local: no reports to Ray's makers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray would say that it leaves .git behind; which files go to the nodes of a cluster, ray_session says.
os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
