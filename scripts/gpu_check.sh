#!/usr/bin/env bash
# Check and measure everything on one GPU in nine minutes: the first thing to run on a new machine.
#
#   bash scripts/gpu_check.sh OUT [CIFAR] [--minutes 9] [--small]
#
# scripts/gpu_check.py has the rest (--help). PYTHON chooses the interpreter: by default that of .venv, else
# the one on the path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3 || command -v python)}
exec "$python" scripts/gpu_check.py "$@"
