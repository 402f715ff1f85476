#!/usr/bin/env bash
# Runs the one-minute demo with each of these Pythons, in a new virtual environment (needs 6 GB of disk space):
#     scripts/try_pythons.sh python3.10 python3.13
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: scripts/try_pythons.sh PYTHON…" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in "$@"; do
    "$python" -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet -r requirements.txt
    "$folder/venv/bin/python" hparam_search.py --quick --output-dir "$folder/outputs" --name "$(basename "$python")"
    echo "$("$python" --version) works."
    rm -rf "$folder/venv"
done
