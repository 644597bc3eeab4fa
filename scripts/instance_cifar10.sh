#!/usr/bin/env bash
# Phase 1 on CIFAR-10 with the published settings: WRN-28-2, seven cosine cycles, 1270 epochs.
#
#   bash scripts/instance_cifar10.sh                       82.12% kNN accuracy published
#   bash scripts/instance_cifar10.sh --arch wrn-28-10      89.83%
#   bash scripts/instance_cifar10.sh --arch resnet18       85.69%
#
# Further words go to unsupervised/cifar.py and win over the settings here. Writes
# checkpoint/instance_cifar10/. Relative paths start at the repository.
# VENV=DIR uses the environment there (scripts/setup.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,10s/^# \{0,1\}//p' "scripts/${BASH_SOURCE[0]##*/}"
    exit 0
fi

bash scripts/setup.sh
exec "${VENV:-.venv}/bin/python" unsupervised/cifar.py \
    --lr-scheduler cosine-with-restart --epochs 1270 "$@"
