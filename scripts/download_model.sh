#!/usr/bin/env bash
# Fetch the published checkpoints, features and pseudo-labels into checkpoint/, each verified or absent.
#
#   bash scripts/download_model.sh                    everything that is not there yet
#   bash scripts/download_model.sh --list             what there is and what for
#   bash scripts/download_model.sh --only 'pseudos/*' a part of it; --help shows all options
#
# Files that are there already are checked and not fetched again. Where the host is gone, --base-url URL takes
# a mirror, and --list names the command of our own that makes a file of the same kind. The exit code is 1 if
# anything is missing. Relative paths start at the repository. VENV=DIR uses the environment there
# (scripts/setup.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec "${VENV:-.venv}/bin/python" -m lib.cli.download "$@"
