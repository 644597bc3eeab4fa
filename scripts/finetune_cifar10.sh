#!/usr/bin/env bash
# Phase 3 on CIFAR-10: train a classifier for each number of labels, with the published settings.
#
#   bash scripts/finetune_cifar10.sh                  50 100 250 500 1000 2000 4000 8000 labels
#   bash scripts/finetune_cifar10.sh 250              71.26% test accuracy published
#   bash scripts/finetune_cifar10.sh 250 4000 --max-iters 20000 --class-balanced
#
# Numbers choose the label counts. Further words go to cifar-semi.py and win over the settings here:
# the most confident 20% of the pseudo-labels (published for 250 labels), 500,000 iterations, weights of
# checkpoint/instance_cifar10/ckpt.cifar.pth.tar.
# PSEUDO_DIR=DIR holds the <labels>.pth.tar of phase 2 (default checkpoint/pseudos/instance_nc_wrn-28-2).
# Writes checkpoint/cifar10-semi/<name of that folder>/<labels>/. Relative paths start at the repository.
# VENV=DIR uses the environment there (scripts/setup.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,13s/^# \{0,1\}//p' "scripts/${BASH_SOURCE[0]##*/}"
    exit 0
fi

pseudo_dir=${PSEUDO_DIR:-checkpoint/pseudos/instance_nc_wrn-28-2}
counts=()
while [[ "${1:-}" =~ ^[0-9]+$ ]]; do
    counts+=("$1")
    shift
done
[ ${#counts[@]} -gt 0 ] || counts=(50 100 250 500 1000 2000 4000 8000)

# before the first of several long runs, not between them
for count in "${counts[@]}"; do
    if [ ! -f "$pseudo_dir/$count.pth.tar" ]; then
        echo "finetune_cifar10: error: there is no $pseudo_dir/$count.pth.tar;" \
            "scripts/propagate_cifar10.sh makes it, PSEUDO_DIR=DIR names another folder" >&2
        exit 2
    fi
done

bash scripts/setup.sh
for count in "${counts[@]}"; do
    echo "== $count labels"
    "${VENV:-.venv}/bin/python" cifar-semi.py --num-labeled "$count" \
        --resume checkpoint/instance_cifar10/ckpt.cifar.pth.tar \
        --pseudo-file "$pseudo_dir/$count.pth.tar" --pseudo-ratio 0.2 \
        --exp-name "$(basename "$pseudo_dir")/$count" "$@"
done
