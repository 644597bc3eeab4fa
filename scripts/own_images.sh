#!/usr/bin/env bash
# Your own images, all the way: a metric, spread labels with a report, a classifier, predictions.
#
#   bash scripts/own_images.sh                      on pictures made for it (scripts/make_pictures.py)
#   bash scripts/own_images.sh --csv                the same, labels in a table instead of folders
#   bash scripts/own_images.sh DIR [NEW]            on yours; NEW: the pictures to classify (default DIR)
#
# DIR holds train/<class>/*, unlabeled/** and, to measure on, test/<class>/*; or labels.csv with the columns
# path, label and, where there are test pictures, split. The commands are printed as they run.
#
# --output OUT       for everything that is written (default checkpoint/own-images)
# --image-size 32    side in pixels that the pictures are brought to
# --arch wrn-10-1    network: small and quick; for your own take wrn-28-2 or resnet18
# --epochs 40        of the metric; a few hundred for your own
# --max-iters 100    steps of the classifier; thousands for your own
#
# About a minute and a half on two cores after the set-up. Relative paths start at the repository. VENV=DIR
# uses the environment there (scripts/setup.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,18s/^# \{0,1\}//p' "scripts/${BASH_SOURCE[0]##*/}"; }
fail() {
    echo "own_images: error: $1" >&2
    exit 2
}

output=checkpoint/own-images size=32 arch=wrn-10-1 epochs=40 iters=100 layout=folders
places=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage && exit 0 ;;
        --csv) layout=csv && shift && continue ;;
        --*) [ -n "${2:-}" ] || fail "$1 needs a value" ;;
        *) places+=("$1") && shift && continue ;;
    esac
    case "$1" in
        --output) output=$2 ;;
        --image-size) size=$2 ;;
        --arch) arch=$2 ;;
        --epochs) epochs=$2 ;;
        --max-iters) iters=$2 ;;
        *) fail "there is no option $1; --help lists them" ;;
    esac
    shift 2
done
[ ${#places[@]} -le 2 ] || fail "give one folder of data and one of new pictures"
for place in ${places[@]+"${places[@]}"}; do
    [ -d "$place" ] || fail "there is no folder $place"
done

bash scripts/setup.sh
python=${VENV:-.venv}/bin/python
run() {
    echo
    echo "\$ python $*"
    "$python" "$@"
}

if [ ${#places[@]} -gt 0 ]; then
    pictures=${places[0]} new=${places[1]:-${places[0]}}
else
    pictures=$output/pictures-$layout
    [ -d "$pictures" ] || run scripts/make_pictures.py --output "$pictures" --layout "$layout"
    new=$pictures/test
    [ "$layout" = folders ] || new=$pictures/pictures/test
fi
data=(--dataset folder --data-dir "$pictures" --image-size "$size")
metric=$output/metric/ckpt.cifar.pth.tar

# 1. A metric, from all pictures and without any label
run unsupervised/cifar.py "${data[@]}" --arch "$arch" --epochs "$epochs" -b 64 --lr 0.1 \
    --lr-scheduler one-cycle --nce-t 0.2 --model-dir "$output/metric" --log-dir "$output/log/metric"

# 2. The labels spread through it; report.html shows what every class got
run scripts/propagate.py "${data[@]}" --checkpoint "$metric" --num-neighbors 10 --num-labeled all \
    --estimate-gain --save-path "$output/pseudo" --report

# 3. A classifier from the labels and as many of the more confident pseudo-labels of every class as help it
run cifar-semi.py "${data[@]}" --arch "$arch" --num-labeled all --resume "$metric" \
    --pseudo-file "$output/pseudo/all.pth.tar" --pseudo-ratio auto --class-balanced \
    --calibrated-weights --labeled-share 0.5 -b 64 --lr 0.1 --lr-scheduler one-cycle --max-iters "$iters" \
    --model-root "$output" --log-root "$output/log" --exp-name classifier

# 4. What it says of new pictures
run scripts/predict.py --checkpoint "$output/classifier/ckpt.pth.tar" --images "$new" \
    --output "$output/predictions.csv" --top 3 --report
echo
head -4 "$output/predictions.csv"
