#!/usr/bin/env bash
# Trains Llama-3.2-1B; takes what the older script of this name took, in the same order:
#
#   train_llama32_1b.sh CHECKPOINT_DIR TENSORBOARD_DIR TOKENIZER_OR_MODEL_DIR DATA_PREFIX DTYPE
#
# A model folder with weights gives sizes, weights and tokenizer; one without, the tokenizer alone.
# MOCK in its place is no tokenizer, in place of the data the text beside this script; an empty
# TENSORBOARD_DIR is none.
# Further arguments go to train.py and win: … fp8 --tp 2 --steps 100. NPROC is the number of
# processes (default: one a GPU), PYTHON the interpreter.
set -euo pipefail

if [ $# -lt 5 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
checkpoint=$1 tensorboard=$2 model=$3 data=$4 dtype=$5
shift 5

arguments=(--checkpoint "$checkpoint" --dtype "$dtype" --size 1b)
if [ -n "$tensorboard" ]; then
    arguments+=(--tensorboard "$tensorboard")
fi
if compgen -G "$model/*.safetensors" > /dev/null; then
    arguments+=(--hf-model "$model")
elif [ "$model" != MOCK ]; then
    arguments+=(--tokenizer "$model")
fi
if [ "$data" != MOCK ]; then
    arguments+=(--data "$data")
fi
arguments+=(--steps 1000 --save-every 500 --lr 1.5e-4)
arguments+=(--micro-batch 1 --global-batch 128 --seq-length 8192)

# Where there is no driver the command is missing.
gpus=$({ nvidia-smi --list-gpus 2> /dev/null || true; } | wc -l)
processes=${NPROC:-$((gpus > 0 ? gpus : 1))}
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    "$(dirname "$0")/train.py" "${arguments[@]}" "$@"
