#!/usr/bin/env bash
# Runs the one-minute demo with several Pythons, each in a new virtual environment (needs 6 GB of disk space).
#     scripts/try_pythons.sh python3.10 python3.13
# Without arguments, it uses the oldest and the newest Python that it finds.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
    found=()
    for minor in 10 11 12 13 14; do
        if command -v "python3.$minor" > /dev/null; then found+=("python3.$minor"); fi
    done
    [ ${#found[@]} -gt 0 ] || { echo "found no Python 3.10 or newer; pass one as an argument" >&2; exit 1; }
    set -- "${found[0]}" "${found[-1]}"
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in "$@"; do
    "$python" -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet -r requirements.txt
    "$folder/venv/bin/python" hparam_search.py --quick --output-dir "$folder/outputs" --name "$(basename "$python")"
    echo "$("$python" --version) works."
    rm -rf "$folder/venv"
done
