#!/usr/bin/env bash
# Everything worth measuring on one GPU in under nine minutes: the first thing to run on a new machine.
#
#   bash scripts/gpu_check.sh OUT                 results into the folder OUT, which is made
#   bash scripts/gpu_check.sh OUT CIFAR           also all three phases on real images: CIFAR is a folder with
#                                                 train/<class>/* and test/<class>/*, or a .tar.gz of one
#
# In turn: does the GPU compute what the CPU computes; training against the published step; loading without
# data; the three phases on CIFAR, ten epochs and 1000 steps each; propagation of 1.28 million points. Each
# step has a time limit and a log of its own, and a step that fails does not stop the others; OUT/summary.md
# lists them, and the exit code is 1 if any failed. PYTHON chooses the interpreter, PYTEST=0 leaves the tests
# out where pytest is not installed. SMALL=1 makes everything tiny, to try this script itself (also on a CPU).
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cifar=${2:-}
[ -z "$cifar" ] || cifar=$(realpath "$cifar")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3 || command -v python)}
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

if [ "${SMALL:-0}" = 1 ]; then
    training=(--arch wrn-10-1 --rounds 1 --steps 1 -b 4)
    imagenet=(--arch resnet18 --rounds 1 --steps 1 -b 2)
    loop=(--arch resnet18 --image-size 64 -b 8 --stop-after 2 --nce-k 16 -j 0)
    phase1=(--arch wrn-10-1 --epochs 1)
    phase3=(--arch wrn-10-1 --max-iters 5 --eval-freq 5 --print-freq 5)
    labels=(20)
    points=(--images 2000 --classes 10 --num-neighbors 10 --num-labeled 50)
else
    training=(--rounds 2)
    imagenet=(--rounds 2 --steps 4)
    loop=(--arch resnet50 --stop-after 60)
    phase1=(--epochs 10 --lr 0.06)
    phase3=(--max-iters 1000 --lr 0.03 --eval-freq 500 --print-freq 100)
    labels=(50 250 4000)
    points=(--images 1280000 --classes 1000 --num-neighbors 51 --num-labeled 13000)
fi

{
    echo "# GPU check"
    echo
    date -u +"%Y-%m-%d %H:%M UTC"
    "$python" -c 'import torch, platform; gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"; print(f"{gpu}; torch {torch.__version__}, Python {platform.python_version()}")'
    echo
    echo "| step | result | seconds | last line |"
    echo "|---|---|---:|---|"
} > "$out/summary.md"

# step NAME LIMIT_S COMMAND...: its output goes to OUT/NAME.log, one row of the table tells how it went
step() {
    local name=$1 limit=$2 start=$SECONDS result=ok
    shift 2
    echo "== $name: $*"
    [ "${SMALL:-0}" = 0 ] || limit=600 # on a machine as slow as it likes
    if ! timeout -k 10 "$limit" "$@" > "$out/$name.log" 2>&1; then
        result=FAILED failed=1
        tail -n 5 "$out/$name.log"
    fi
    printf '| %s | %s | %d | %s |\n' "$name" "$result" $((SECONDS - start)) \
        "$(grep -v '^$' "$out/$name.log" | tail -n 1 | tr '|\r' '/ ' | cut -c 1-150)" >> "$out/summary.md"
}

[ "${PYTEST:-1}" = 0 ] || step agreement 50 env TEST_GPU="$gpu" "$python" -m pytest -q -m gpu tests/training/test_devices_agree.py
cifar_tasks=(--tasks pretrain-cifar finetune-cifar)
step training 70 "$python" scripts/benchmarks/training.py "${training[@]}" "${cifar_tasks[@]}" --output "$out/training.json"
step imagenet 60 "$python" scripts/benchmarks/training.py "${imagenet[@]}" --tasks pretrain-imagenet finetune-imagenet \
    -j "$(nproc)" --output "$out/imagenet.json"
step compiled 70 "$python" scripts/benchmarks/training.py "${training[@]}" "${cifar_tasks[@]}" --variants ours compiled \
    --output "$out/compiled.json"
step loop 30 "$python" unsupervised/imagenet.py --dummy "${loop[@]}" --model-dir "$work/dummy" \
    --log-dir "$out/loop" --profile 2
if [ -n "$cifar" ]; then
    data=$cifar
    if [ -f "$cifar" ]; then
        data=$work/cifar
        mkdir "$data" && step unpack 15 tar -xzf "$cifar" -C "$data"
        # most archives have one folder at the top
        [ -d "$data/train" ] || data=$(dirname "$(find "$data" -maxdepth 3 -type d -name train | head -n 1)")
    fi
    folder=(--dataset folder --data-dir "$data" -j "$(nproc)")
    step phase1 75 "$python" unsupervised/cifar.py "${folder[@]}" "${phase1[@]}" --lr-scheduler one-cycle \
        --model-dir "$work/metric" --log-dir "$out/phase1"
    metric=$work/metric/ckpt.cifar.pth.tar
    step phase2 25 "$python" scripts/propagate.py "${folder[@]}" --checkpoint "$metric" \
        --num-labeled "${labels[@]}" --save-path "$work/pseudo"
    for n in "${labels[@]}"; do
        step "phase3-$n" 35 "$python" cifar-semi.py "${folder[@]}" "${phase3[@]}" --lr-scheduler one-cycle \
            --num-labeled "$n" --resume "$metric" --pseudo-file "$work/pseudo/$n.pth.tar" --pseudo-ratio 0.2 \
            --model-root "$work" --log-root "$out" --exp-name "phase3-$n"
    done
fi
step propagation 40 "$python" scripts/benchmarks/propagation.py "${points[@]}" --variants nc --gpus 0 \
    --output "$out/propagation.json"
cat "$out/summary.md"
exit $failed
