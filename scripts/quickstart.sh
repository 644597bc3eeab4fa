#!/usr/bin/env bash
# The three phases on the embedded data set, from nothing to a table, on the CPU.
#
#   bash scripts/quickstart.sh            about four minutes on two cores after the set-up
#   bash scripts/quickstart.sh --help     its options
#
# Makes .venv with what is missing first (scripts/setup.sh). Everything that it makes goes to
# checkpoint/quickstart/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec "${VENV:-.venv}/bin/python" scripts/quickstart.py "$@"
