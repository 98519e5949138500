#!/bin/bash
# One training stage on a CUDA machine: training/stage.sh STAGE RUN_FOLDER DATA TOKENIZERS OUT [MINUTES]
# Stages: vae | first | more | samples. Each resumes from RUN_FOLDER; OUT receives logs, small checkpoints and pictures.
set -u
stage=$1 run=$2 data=$3 tokens=$4 out=$5 minutes=${6:-3}
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_NUM_THREADS=4
mkdir -p "$run/logs" "$out"
python() { python3 -W ignore "$@" 2>&1 | grep -v -i 'siglip\|CLIPImage\|model shards'; }
train() { python "$here/train.py" "$1" "$data" "$run" "$tokens" "${@:2}" > "$run/logs/$1.$stage.txt"; }
show() {  # model [sample.py options]: assemble the folder and draw
    python "$here/assemble.py" "$1" "$data" "$run" "$tokens" "$run/models/$1"
    python "$here/sample.py" "$run/models/$1" "$data" "$run/samples/$1" "${@:2}"
}
share() { awk "BEGIN { print $minutes * $1 }"; }
case $stage in
vae)
    for c in 4 8; do
        mkdir -p "$run/c$c"
        python "$here/train_vae.py" "$data" "$run/c$c" --minutes "$minutes" --channels $c > "$run/logs/vae$c.txt" &
    done
    wait
    tail -n 3 "$run"/logs/vae?.txt
    ;;
first)
    (train emoji-flux --minutes "$(share 0.68)"; train emoji-flux --distil --minutes "$(share 0.2)"; show emoji-flux --sheet-only --sweep) &
    (train emoji-sd --minutes "$minutes"; show emoji-sd --sheet-only --sweep) &
    (train emoji-dit --minutes "$minutes"; show emoji-dit --sheet-only --sweep) &
    wait
    ;;
samples)
    for model in emoji-flux emoji-sd emoji-dit; do show $model --sweep & done
    wait
    ;;
esac
