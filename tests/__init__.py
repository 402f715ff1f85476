import os

# Read when torch is loaded. Searches run beside tests here: a thread that waits should not spin on a core others need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
