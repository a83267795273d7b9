#!/usr/bin/env bash
# Has anomalib, ultralytics and others read what scripts/export_generated.py writes; the normal tests do without them.
#     bash tests/consumers/run.sh FOLDER    # of their virtual environment, made and filled (some GB) where needed
set -euo pipefail
venv="$(realpath "${1:?say the folder of the virtual environment}")"
cd "$(dirname "$0")/../.."
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check \
    -c constraints.txt -e . -r tests/requirements.txt -r tests/consumers/requirements.txt
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
"$venv/bin/python" -m pytest -q tests/consumers/test_consumers.py
