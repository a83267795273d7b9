#!/usr/bin/env bash
# Makes a virtual environment, installs, and runs style checks and all tests. Arguments go to pytest.
#     bash scripts/test.sh [-k resume]
# VENV names another environment to use or make (default .venv).
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
# One thread each in two workers: at this size threads do not help, and two OpenMP programs get in each other's way.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
"$venv/bin/python" -m pytest -q -n "${WORKERS:-2}" "$@"
