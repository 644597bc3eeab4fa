#!/usr/bin/env bash
# Phase 3 on ImageNet with the published settings: ResNet-50, 13,000, 26,000 and 51,000 labels (1, 2 and 4%)
# with the most confident 10, 20 and 50% of the pseudo-labels, 50,000 iterations of 256 images.
#
#   bash scripts/finetune_imagenet.sh --data-dir DIR                 all three
#   bash scripts/finetune_imagenet.sh 13000 --data-dir DIR
#   bash scripts/finetune_imagenet.sh 13000 --data-dir DIR --gpus 0 --max-iters 20000
#
# --data-dir DIR     train/<class>/* and val/<class>/* (default data/imagenet)
# --checkpoint FILE  of phase 1 (default checkpoint/instance_imagenet/model_best.pth.tar)
# --pseudos DIR      of phase 2, holding num_labeled_<labels>/10_0.pth.tar ... 10_9.pth.tar
#                    (default checkpoint/pseudos_imagenet/instance_imagenet_nc)
#
# Numbers choose the label counts. Further words go to imagenet-semi.py and win over the settings here. Writes
# checkpoint/imagenet/<name of the folder of pseudo-labels>/<labels>/; a run that was stopped goes on when
# the same command is given again. Relative paths start at the repository. VENV=DIR uses the environment
# there (scripts/setup.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,18s/^# \{0,1\}//p' "scripts/${BASH_SOURCE[0]##*/}"
    exit 0
fi
fail() {
    echo "finetune_imagenet: error: $1" >&2
    exit 2
}

ratio() {
    case "$1" in 13000) echo 0.1 ;; 26000) echo 0.2 ;; 51000) echo 0.5 ;; *) return 1 ;; esac
}

counts=()
while [[ "${1:-}" =~ ^[0-9]+$ ]]; do
    ratio "$1" >/dev/null || fail "no ratio is published for $1 labels; take 13000, 26000 or 51000"
    counts+=("$1")
    shift
done
[ ${#counts[@]} -gt 0 ] || counts=(13000 26000 51000)

data_dir=data/imagenet
checkpoint=checkpoint/instance_imagenet/model_best.pth.tar
pseudos=checkpoint/pseudos_imagenet/instance_imagenet_nc
words=()
while [ $# -gt 0 ]; do
    case "$1" in
        --data-dir | --checkpoint | --pseudos)
            [ -n "${2:-}" ] || fail "$1 needs a path"
            name=${1#--}
            printf -v "${name//-/_}" %s "$2"
            shift 2
            ;;
        *) words+=("$1") && shift ;;
    esac
done

# before the first of several long runs, not between them
[ -d "$data_dir" ] || fail "there is no folder $data_dir; name yours with --data-dir DIR"
[ -f "$checkpoint" ] || fail "there is no $checkpoint; name one with --checkpoint FILE"
for count in "${counts[@]}"; do
    [ -d "$pseudos/num_labeled_$count" ] ||
        fail "there is no $pseudos/num_labeled_$count; scripts/propagate_imagenet.sh makes it, --pseudos names another"
done

bash scripts/setup.sh
for count in "${counts[@]}"; do
    echo "== $count labels"
    "${VENV:-.venv}/bin/python" imagenet-semi.py --data-dir "$data_dir" --arch resnet50 \
        --num-labeled "$count" --pseudo-ratio "$(ratio "$count")" \
        --pseudo-dir "$pseudos/num_labeled_$count" --pretrained "$checkpoint" --resume auto \
        --exp-name "$(basename "$pseudos")/$count" ${words[@]+"${words[@]}"}
done
