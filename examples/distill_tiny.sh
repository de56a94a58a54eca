#!/usr/bin/env bash
# A student of half the layers learns from the quickstart's model what is in its layers and what it predicts, and for
# comparison from the text alone: the same tokens in the same order, a few minutes on two CPU cores.
#
#   make quickstart                                # the teacher, and the text
#   examples/distill_tiny.sh [QUICKSTART] [FOLDER] # defaults: quickstart_run, distill_run
#
# STEPS=100 chooses how long. The same command continues what was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi
TEACHER=${1:-quickstart_run} OUT=${2:-distill_run} STEPS=${STEPS:-100}

if [ ! -e "$TEACHER/run/checkpoints/latest" ]; then
    echo "distill_tiny: $TEACHER has no trained model; make quickstart trains one" >&2
    exit 2
fi
STUDENT=(megatron-7b pretrain --config tiny_cpu --model.num-layers 2 --data.train "$TEACHER/sotu_text_document"
    --training.train-steps "$STEPS" --training.eval-interval-steps "$STEPS" --training.eval-steps 16)
"${STUDENT[@]}" --run-dir "$OUT/alone"
"${STUDENT[@]}" --run-dir "$OUT/taught" --distillation.teacher "$TEACHER/run" --distillation.alpha 0.5 \
    --distillation.hidden True --distillation.hidden-weight 0.1

for run in alone taught; do
    printf '%-7s' "$run"
    grep -o '"validation_perplexity": *[0-9.]*' "$OUT/$run/metrics.jsonl" | tail -1
done
