#!/usr/bin/env bash
# What only a GPU can show, without a network: speed and memory, and the commands themselves.
#
#     bash extras/gpu.sh PHOTOS OUT [options of tinymim.py for every command, to try this script]
#
# PHOTOS: a folder of images for each class. OUT gets, at once, summary.txt (how each step ended and
# what it measured) and log.txt (all output). The most useful come first. Variables to set before:
#     TOTAL=570          seconds, after which no step is started or goes on
#     FROM=NAME          begin with this step: a second call, where the first one ended
#     ONLY=REGEX         only the steps whose names match
#     COPIES=N           of the photos make an epoch (default: so many that it has 5,000 images)
#     GPU_STUDY=OPTIONS  run extras/study.py with them, too (nothing else: ONLY=study)
set -u
photos=$(realpath "$1"); out=$(realpath -m "$2"); shift 2; cd "$(dirname "$0")/.."
mkdir -p "$out"; work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
teacher=$work/mae_base.pth  # random weights
python -c "import torch, tinymim
torch.save(tinymim.ViT(*tinymim.STUDENTS['base']).state_dict(), '$teacher')"
mkdir -p "$work/data/train"; ln -s train "$work/data/val"
count=$(find -L "$photos" -type f | wc -l)
for copy in $(seq "${COPIES:-$((5000 / count + 1))}"); do
    for class in "$photos"/*/; do ln -s "$class" "$work/data/train/$(basename "$class")-$copy"; done
done

try() {  # try LIMIT NAME COMMAND...: at most LIMIT seconds
    local limit=$1 name=$2 began=$SECONDS left=$((${TOTAL:-570} - SECONDS)) status; shift 2
    [[ $name == "${FROM:-}" ]] && FROM=
    [[ -z ${FROM:-} && $name =~ ${ONLY:-.} ]] || return 0
    if ((left < 20)); then echo "$name: no time left" | tee -a "$out/summary.txt"; return; fi
    echo "==== $name: $*" >> "$out/log.txt"
    timeout -k 5 $((left < limit ? left : limit)) "$@" 2>&1 | tee -a "$out/log.txt" > "$work/$name.log"
    status=${PIPESTATUS[0]}
    { echo "$name: exit $status, $((SECONDS - began)) s: $(tr '\r' '\n' < "$work/$name.log" |
          grep '[^ ]' | tail -1 | cut -c1-250)"
      [[ $name == compile-* ]] || grep -E '^(step|parts|end to end|pipeline) \{' "$work/$name.log"
    } | tee -a "$out/summary.txt"
}
distil=(python tinymim.py --teacher "$teacher" --data "$work/data" "$@")
tune=(python finetune.py --data "$work/data" "$@")
speed=(python extras/benchmark.py --data "$work/data" "$@")
[[ " $* " == *" --no-compile "* ]] && ours=eager || ours=compiled
changes="$ours checkpoint matmul both"
small="--student small" base="--student base --teacher mae_large"

# The compiler works for all at once, and the steps after this find its results in its cache.
declare -A runs=([speed-tiny]="--variants $ours" [speed-small]="$small --variants $ours"
    [speed-base]="$base --variants $ours")
for student in tiny small base; do
    runs[finetune-$student]="--student $student --batch-size 128 --variants finetune"
done
for change in checkpoint matmul both; do
    runs[$change-small]="$small --variants $change" runs[$change-base]="$base --variants $change"
done
for name in "${!runs[@]}"; do
    try 200 "compile-$name" "${speed[@]}" ${runs[$name]} --measure --repeats 1 &
done
wait; [[ ${FROM:-} == compile-* ]] && FROM=
for name in {speed,finetune}-{tiny,small,base}; do
    [[ $name == *-tiny ]] && pipeline=pipeline || pipeline=
    try 100 "$name" "${speed[@]}" ${runs[$name]} --measure training $pipeline
done
for name in {checkpoint,matmul,both}-{small,base}; do
    try 60 "$name" "${speed[@]}" ${runs[$name]} --measure
done
try 300 changes-tiny "${speed[@]}" --variants $changes --measure
try 90 no-memory "${distil[@]}" --student base --batch-size 4096 --no-compile --out "$work/big"
try 200 resume bash -c '"$@" & while [ ! -e "$0/last.pth" ] && kill -0 $!; do sleep 1; done
    kill $!; wait; "$@" --resume' "$work/tiny" "${distil[@]}" --epochs 9 --out "$work/tiny"
try 120 tune "${tune[@]}" --checkpoint "$work/tiny/last.pth" --epochs 1 --out "$work/tuned"
try 60 evaluate "${tune[@]}" --checkpoint "$work/tuned/last.pth" --eval
[[ -n ${GPU_STUDY:-} ]] && try 560 study python extras/study.py $GPU_STUDY
try 500 table "${speed[@]}" --json
try 120 fp16 "${distil[@]}" --epochs 1 --amp fp16 --out "$work/fp16"
try 120 compiler env TORCH_LOGS=recompiles,graph_breaks "${distil[@]}" --epochs 1 --out "$work/logs"
try 120 no-waiting python -c "import sys, torch, tinymim
torch.cuda.set_sync_debug_mode('warn')
tinymim.main(sys.argv[1:])" "${distil[@]:2}" --epochs 1 --out "$work/no-waiting"
(($(nvidia-smi -L 2> /dev/null | wc -l) < 2)) || try 120 two-gpus torchrun --nproc-per-node 2 \
    "${distil[@]:1}" --epochs 1 --out "$work/two"
