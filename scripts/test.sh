#!/usr/bin/env bash
# Run the checks of this repository: ruff, shellcheck, then the tests. Further words go to pytest:
#
#   bash scripts/test.sh                  the quick suite, and what is marked `gpu` where there is a GPU
#   bash scripts/test.sh slow             the slow one: kills, resumes, fuzzing, the quickstart
#   bash scripts/test.sh all              one after the other, as continuous integration does
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
suite=quick
case "${1:-}" in
    quick | slow | all) suite=$1 && shift ;;
esac
bash scripts/setup.sh test
bin=${VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/shellcheck" scripts/*.sh .ci/run
if [ "$suite" != slow ]; then
    # a process for each core, one thread in each
    OMP_NUM_THREADS=1 "$bin/python" -m pytest -n auto --maxprocesses 8 "$@"
    if "$bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        TEST_GPU=1 "$bin/python" -m pytest -m gpu "$@"
    fi
fi
if [ "$suite" != quick ]; then
    OMP_NUM_THREADS=1 "$bin/python" -m pytest -m slow -n auto --maxprocesses 8 --dist worksteal "$@"
fi
