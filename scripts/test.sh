#!/usr/bin/env bash
# Makes a virtual environment from the lock, constraints.txt, and runs style checks and all tests. Arguments go to pytest.
#     bash scripts/test.sh [-k resume]
#     bash scripts/test.sh --quick [-k resume]     # without the tests marked slow, a few minutes
#     bash scripts/test.sh --full [-k signals]     # with every variant of the faults, half an hour more
#     bash scripts/test.sh --newest [-k resume]    # the tests alone, with what a resolver takes without the lock
# VENV names another environment to use or make (default .venv); --newest makes .venv-newest anew.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
# One thread each in two workers: at this size threads do not help, and two OpenMP programs get in each other's way.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check -e . -r tests/requirements.txt "$@"
}
run_tests() {
    "$venv/bin/python" -m pytest -q -n "${WORKERS:-2}" "$@"
}

if [ "${1:-}" = --newest ]; then
    shift
    venv=.venv-newest
    rm -rf "$venv"
    python3 -m venv "$venv"
    if ! install > "$venv/install.log"; then
        tail -n 20 "$venv/install.log"
        echo "The install failed, before any test"
        exit 1
    fi
    status=0
    NEWEST=1 run_tests --junit-xml "$venv/tests.xml" "$@" || status=$?
    "$venv/bin/python" tests/lock.py "$venv/tests.xml"
    exit "$status"
fi

[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
stamp="$(pwd; sha256sum constraints.txt requirements.txt tests/requirements.txt pyproject.toml)"
if [ "$(cat "$venv/defectfill.stamp" 2>/dev/null)" != "$stamp" ]; then
    install -q -c constraints.txt
    echo "$stamp" > "$venv/defectfill.stamp"
fi
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
if [ "${1:-}" = --quick ]; then
    shift
    set -- -m "not slow" "$@"
fi
run_tests "$@"
