#!/usr/bin/env bash
# Phase 2 on CIFAR-10: run the notebooks headless, one pseudo-label file per number of labels.
#
#   bash scripts/propagate_cifar10.sh                 nearest neighbors, then normalized cut
#   bash scripts/propagate_cifar10.sh nc              one of them: knn or nc
#   bash scripts/propagate_cifar10.sh nc -p checkpoint FILE -y 'num_labeled: [250, 4000]'
#
# Further words go to papermill: -p NAME VALUE sets a parameter of the notebook (its first cell lists
# them), -y 'NAME: [1, 2]' one that is a list. Files, pictures and the executed notebook go to
# checkpoint/pseudos/instance_{knn,nc}_wrn-28-2, or to -p save_path DIR (DIR/knn and DIR/nc where both
# run). Relative paths start at the repository. VENV=DIR uses the environment there (scripts/setup.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,11s/^# \{0,1\}//p' "scripts/${BASH_SOURCE[0]##*/}"; }
fail() {
    echo "propagate_cifar10: error: $1" >&2
    exit 2
}

algorithms=(knn nc)
case "${1:-}" in
    -h | --help) usage && exit 0 ;;
    knn | nc) algorithms=("$1") && shift ;;
    both) shift ;;
    "" | -*) ;;
    *) fail "there is no algorithm $1; take knn, nc or both" ;;
esac

save_path=
words=()
while [ $# -gt 0 ]; do
    if [[ "$1" =~ ^(-p|-r|--parameters|--parameters_raw)$ && "${2:-}" = save_path ]]; then
        [ -n "${3:-}" ] || fail "save_path needs a folder"
        save_path=$3
        shift 3
    else
        words+=("$1")
        shift
    fi
done

for algorithm in "${algorithms[@]}"; do
    folder=${save_path:-checkpoint/pseudos/instance_${algorithm}_wrn-28-2}
    if [ -n "$save_path" ] && [ ${#algorithms[@]} -gt 1 ]; then
        folder=$save_path/$algorithm
    fi
    bash scripts/notebook.sh "$algorithm" "$folder" ${words[@]+"${words[@]}"}
done
