#!/usr/bin/env bash
# Phase 1 on ImageNet with the published settings: NCE with 4096 negatives, 200 epochs, on four GPUs.
#
#   bash scripts/instance_imagenet.sh DIR      ResNet-50, 46.8% nearest-neighbor top-1 published
#
# ResNet-18 (41.0%): add --arch resnet18 --model-dir checkpoint/instance_resnet18
#                    --log-dir tensorboard/instance_resnet18
#
# DIR holds train/<class>/* and val/<class>/*. Further words go to unsupervised/imagenet.py and win over
# the settings here, such as --gpus 0 or -j 16. The same command continues a run that was interrupted.
# Writes checkpoint/instance_imagenet/. Relative paths start at the repository.
# VENV=DIR uses the environment there (scripts/setup.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,12s/^# \{0,1\}//p' "scripts/${BASH_SOURCE[0]##*/}"
    exit 0
fi
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    echo "instance_imagenet: error: the first word names the folder that holds train/ and val/" >&2
    exit 2
fi
data_dir=$1
shift

bash scripts/setup.sh
exec "${VENV:-.venv}/bin/python" unsupervised/imagenet.py --data-dir "$data_dir" --gpus 0,1,2,3 \
    --arch resnet50 -j 32 --nce-k 4096 --nce-t 0.07 --lr 0.03 --epochs 200 --auto-resume "$@"
