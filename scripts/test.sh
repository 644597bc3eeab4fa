#!/usr/bin/env bash
# Run the checks of this repository: ruff, shellcheck, then the tests. Further words go to pytest:
#
#   bash scripts/test.sh                  the quick suite, under four minutes on two cores
#   bash scripts/test.sh -m slow          the slow one
#   bash scripts/test.sh -m ''            both, as continuous integration does
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh test
bin=${VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/shellcheck" scripts/*.sh .ci/run
exec "$bin/python" -m pytest "$@"
