#!/bin/bash
# One stage on a CUDA machine: training/stage.sh STAGE RUN_FOLDER DATA TOKENIZERS [MINUTES]
# Stages, in this order: vae, denoisers, refine, distil, samples. Each resumes from what is in RUN_FOLDER.
set -u
stage=$1 run=$2 data=$3 tokens=$4 minutes=${5:-4}
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_NUM_THREADS=4
mkdir -p "$run/logs"
train() { python3 -W ignore "$here/train.py" "$1" "$data" "$run" "$tokens" "${@:2}" > "$run/logs/$1.$stage.txt" 2>&1; }
case $stage in
vae)
    python3 -W ignore "$here/train_vae.py" "$data" "$run" --minutes "$minutes"
    ;;
denoisers)  # the three side by side: each alone leaves the GPU waiting for launches
    for model in emoji-flux emoji-sd emoji-dit; do train $model --minutes "$minutes" & done
    wait
    ;;
refine)  # emoji-flux gained too little by it
    train emoji-sd --refine --lr 0.6 --minutes "$minutes"
    ;;
distil)
    train emoji-flux --distil --minutes "$minutes"
    ;;
samples)
    for model in emoji-flux emoji-sd emoji-dit; do
        python3 -W ignore "$here/assemble.py" $model "$data" "$run" "$tokens" "$run/models/$model" &&
            python3 -W ignore "$here/sample.py" "$run/models/$model" "$data" "$run/samples/$model" --sweep &
    done
    wait
    ;;
*)
    echo "unknown stage '$stage': vae, denoisers, refine, distil or samples" >&2
    exit 2
    ;;
esac
