#!/usr/bin/env bash
# Everything that only a GPU can show, without a network: the commands, then the benchmarks.
#
#     bash extras/gpu.sh PHOTOS OUT [options for every run of tinymim.py and finetune.py, to try this script]
#
# PHOTOS: a folder of images for each class. OUT: a new folder for what the commands print and write, and for
# summary.txt: each command's exit status, time and last line. Teachers have MAE's sizes and random weights.
# ONLY=REGEX in front runs only the commands whose names match. COPIES (20) times the photos make an epoch:
# no-memory needs 4096 or more.
set -u
photos=$(realpath "$1"); out=$(realpath -m "$2"); shift 2; more=("$@")
cd "$(dirname "$0")/.."; mkdir -p "$out"/{data,logs,runs}

for copy in $(seq "${COPIES:-20}"); do  # the same photos again and again: an epoch of some length
    for class in "$photos"/*/; do ln -sfn "$class" "$out/data/$(basename "$class")-$copy"; done
done
mkdir -p "$out/labelled"; ln -sfn "$out/data" "$out/labelled/train"; ln -sfn "$out/data" "$out/labelled/val"
python - "$out" <<'PYTHON'
import sys, torch, tinymim
torch.manual_seed(0)
for size in ("base", "large"):
    torch.save({"model": tinymim.ViT(*tinymim.STUDENTS[size]).state_dict()}, f"{sys.argv[1]}/mae_{size}.pth")
PYTHON

try() {  # try NAME COMMAND...: at most LIMIT seconds, two minutes by default
    local name=$1 began=$SECONDS; shift
    [[ $name =~ ${ONLY:-.} ]] || return 0
    timeout "${LIMIT:-120}" "$@" > "$out/logs/$name.log" 2>&1
    local line="$name: exit $?, $((SECONDS - began)) s: $(tr '\r' '\n' < "$out/logs/$name.log" | grep . | tail -1)"
    echo "$line" | cut -c1-300 | tee -a "$out/summary.txt"
}
distil() {  # distil NAME STUDENT TEACHER OPTIONS...
    local name=$1 student=$2 teacher=$3; shift 3
    try "$name" python tinymim.py --student "$student" --teacher "$out/mae_$teacher.pth" --data "$out/data" \
        --out "$out/runs/$name" --epochs 1 "$@" "${more[@]}"
}

LIMIT=600 try tests python -m pytest -q -x
distil tiny-256 tiny base --batch-size 256
distil tiny-512 tiny base --batch-size 512
distil tiny-fp16 tiny base --batch-size 256 --amp fp16
distil tiny-eager tiny base --batch-size 256 --no-compile
distil small-256 small base --batch-size 256
distil base-256 base large --batch-size 256
distil resumed tiny base --batch-size 256
distil resumed tiny base --batch-size 256 --epochs 2 --resume
distil no-memory base large --batch-size 4096  # one line, and exit status 1
TORCH_LOGS=recompiles,graph_breaks distil compiler tiny base --batch-size 256  # its log should name none
try no-waiting python -c "import sys, torch, tinymim
torch.cuda.set_sync_debug_mode('warn')
tinymim.main(sys.argv[1:])" --teacher "$out/mae_base.pth" --data "$out/data" --out "$out/runs/no-waiting" \
    --epochs 1 "${more[@]}"
for student in tiny small base; do  # its speed: images/s of the last epoch
    try "finetune-$student" python finetune.py --checkpoint "$out/runs/$student-256/last.pth" --data "$out/labelled" \
        --out "$out/runs/finetune-$student" --epochs 3 --batch-size 256 "${more[@]}"
done
try evaluate python finetune.py --eval --checkpoint "$out/runs/finetune-tiny/last.pth" --data "$out/labelled"
if [ "$(nvidia-smi -L 2>/dev/null | wc -l)" -gt 1 ]; then
    try two-gpus torchrun --nproc-per-node 2 tinymim.py --teacher "$out/mae_base.pth" --data "$out/data" \
        --out "$out/runs/two" --epochs 1
fi
for student in tiny small base; do
    teacher=$([ $student = base ] && echo mae_large || echo mae_base)
    LIMIT=600 try "benchmark-$student" python extras/benchmark.py --data "$out/data" --student $student \
        --teacher $teacher --json
done
