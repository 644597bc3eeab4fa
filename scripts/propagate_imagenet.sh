#!/usr/bin/env bash
# Phase 2 on ImageNet with the published settings: 13,000, 26,000 and 51,000 labels (1, 2 and 4%), the
# unlabeled images in 10 chunks, each a graph of 500 neighbors with local scale, 200 eigenvectors.
#
#   bash scripts/propagate_imagenet.sh --data-dir DIR --checkpoint FILE     extract, then normalized cut
#   bash scripts/propagate_imagenet.sh --features FILE                      from a feature file instead
#   bash scripts/propagate_imagenet.sh knn --features FILE                  nearest neighbors
#
# --data-dir DIR     train/<class>/* (default data/imagenet); not read with --features
# --checkpoint FILE  of phase 1 (default checkpoint/instance_imagenet/model_best.pth.tar)
# --features FILE    keys features and labels, as in the published cache
# --save-path DIR    default checkpoint/pseudos_imagenet/instance_imagenet_{nc,knn}
# --single           one graph of all images and one file <labels>.pth.tar, instead of ten chunks
#
# Writes num_labeled_<labels>/10_0.pth.tar ... 10_9.pth.tar for imagenet-semi.py --pseudo-dir, pictures and
# the executed notebook. Further words go to papermill: -p NAME VALUE sets another parameter of the
# notebook (its first cell lists them), -y 'num_labeled: [13000]' a list. Relative paths start at the
# repository. VENV=DIR uses the environment there (scripts/setup.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,19s/^# \{0,1\}//p' "scripts/${BASH_SOURCE[0]##*/}"; }
fail() {
    echo "propagate_imagenet: error: $1" >&2
    exit 2
}

algorithm=nc
case "${1:-}" in
    -h | --help) usage && exit 0 ;;
    knn | nc) algorithm=$1 && shift ;;
    "" | -*) ;;
    *) fail "there is no algorithm $1; take knn or nc" ;;
esac

save_path=checkpoint/pseudos_imagenet/instance_imagenet_$algorithm
words=()
while [ $# -gt 0 ]; do
    case "$1" in
        --data-dir | --checkpoint | --features | --save-path)
            [ -n "${2:-}" ] || fail "$1 needs a path"
            parameter=${1#--}
            if [ "$1" = --save-path ]; then
                save_path=$2
            else
                [ -e "$2" ] || fail "$1 $2: there is no such file or folder"
                words+=(-r "${parameter//-/_}" "$2")
            fi
            shift 2
            ;;
        --single) words+=(-p chunks 1) && shift ;;
        *) words+=("$1") && shift ;;
    esac
done
given=" ${words[*]-} "
if [[ "$given" != *" checkpoint "* && "$given" != *" features "* ]]; then
    default=checkpoint/instance_imagenet/model_best.pth.tar
    [ -e "$default" ] || fail "there is no $default; name --checkpoint FILE or --features FILE"
fi
exec bash scripts/notebook.sh "$algorithm-imagenet" "$save_path" ${words[@]+"${words[@]}"}
