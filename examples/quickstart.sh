#!/usr/bin/env bash
# The whole road on real text, in a few minutes on two CPU cores: State of the Union speeches -> tokenizer -> tokens ->
# training with tensor parallelism on two processes -> stop, resume with another layout -> Hugging Face -> text.
#
#   make quickstart                         # sets everything up first
#   examples/quickstart.sh [FOLDER]         # with the environment that is there; default: quickstart_run
#
# Every command is shown as you would type it. Any failure ends the script with a non-zero status, and so does a model
# whose validation loss is not well below the unigram entropy of the corpus.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi

# Libraries' notes on what is not installed, and their progress bars, would hide the commands.
export PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1

OUT=${1:-quickstart_run}
STEPS=${QUICKSTART_STEPS:-110}
STOP_AT=$((STEPS / 2))
PROMPT="My fellow citizens of the"

started=$SECONDS
timings=()

if [ -t 1 ]; then BOLD=$'\033[1m' BLUE=$'\033[36m' PLAIN=$'\033[0m'; else BOLD="" BLUE="" PLAIN=""; fi
title() { printf '\n%s── %s%s\n' "$BOLD" "$*" "$PLAIN"; }

# Show a command as it would be typed (arguments that need no quotes get none).
show() {
    local word line=""
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@+-]+$ ]]; then line+=" $word"; else line+=" \"$word\""; fi
    done
    printf '%s$%s%s\n' "$BLUE" "$line" "$PLAIN"
}

# Show a command, run it, and note how long it took: run NAME COMMAND …; KEEP=FILE keeps what it prints.
run() {
    local name=$1 before=$SECONDS
    shift
    show "$@"
    if [ -n "${KEEP:-}" ]; then "$@" | tee "$KEEP"; else "$@"; fi
    timings+=("$name=$((SECONDS - before))")
}

fail() {
    printf '\nquickstart: %s\n' "$*" >&2
    exit 1
}

rm -rf "$OUT"
mkdir -p "$OUT"

title "Real text: the State of the Union speeches, as JSON lines"
run "fetch the text" tools/fetch_sotu.py "$OUT/sotu.jsonl"

title "A byte-level BPE of 8,192 tokens, trained on it"
run "train the tokenizer" megatron-7b tokenizer train --input "$OUT/sotu.jsonl" --vocab-size 8192 --output "$OUT/tokenizer"

title "Text to tokens, in Megatron's .bin/.idx format"
run "tokenize" tools/preprocess_data.py --input "$OUT/sotu.jsonl" --output-prefix "$OUT/sotu" \
    --tokenizer-model "$OUT/tokenizer" --append-eod --workers 2
DATA=$OUT/sotu_text_document
run "show a document" megatron-7b data show "$DATA" --documents 1
show tools/unigram_entropy.py "$DATA"
ENTROPY=$(tools/unigram_entropy.py "$DATA")
echo "$ENTROPY nats per token: the loss of a model that knows how often each token occurs, and nothing else"

# Both legs of the training are this command; they differ in their layout alone.
PRETRAIN=(megatron-7b pretrain --config tiny_cpu --run-dir "$OUT/run" --nproc 2 --data.train "$DATA"
    --training.train-steps "$STEPS" --training.eval-interval-steps "$STOP_AT")
TENSOR=(--parallel.tensor-model-parallel-size 2)
PIPELINE=(--parallel.pipeline-model-parallel-size 2 --training.micro-batch-size 4) # more microbatches, less waiting

title "Training with tensor parallelism on two processes; half-way a SIGTERM, as a cluster would send it"
before=$SECONDS
show "${PRETRAIN[@]}" "${TENSOR[@]}"
"${PRETRAIN[@]}" "${TENSOR[@]}" &
trainer=$!
trap 'kill -TERM $trainer 2>/dev/null || true' EXIT
steps_done() {
    local lines
    lines=$(grep -c '"loss"' "$OUT/run/metrics.jsonl" 2>/dev/null) || true
    echo "${lines:-0}"
}
until [ "$(steps_done)" -ge "$STOP_AT" ] || ! kill -0 $trainer 2>/dev/null; do sleep 0.2; done
show kill -TERM $trainer
kill -TERM $trainer 2>/dev/null || true
status=0
wait $trainer || status=$?
trap - EXIT
[ $status = 75 ] || fail "the stopped run left with exit code $status; 75 (saved, resume me) was expected"
stopped_at=$(steps_done)
echo "exit code 75 after $stopped_at steps: saved, resume me"
timings+=("train, TP 2=$((SECONDS - before))")

title "The same run, resumed with pipeline parallelism"
run "train, PP 2" "${PRETRAIN[@]}" "${PIPELINE[@]}"

title "To Hugging Face; refused unless both models give the same logits"
run "convert" megatron-7b convert to-hf --checkpoint "$OUT/run/checkpoints/latest" --output "$OUT/hf"

title "Text from both: ours from the training checkpoint, transformers from the converted folder"
KEEP=$OUT/ours.txt run "generate, ours" megatron-7b generate --checkpoint "$OUT/run/checkpoints/latest" --prompt "$PROMPT" \
    --max-new-tokens 24 --greedy
KEEP=$OUT/transformers.txt run "generate, transformers" python -c "from transformers import pipeline; \
print(pipeline('text-generation', '$OUT/hf')('$PROMPT', max_new_tokens=24, do_sample=False)[0]['generated_text'])"

cmp -s "$OUT/ours.txt" "$OUT/transformers.txt" || fail "the two texts differ"
echo "the same text, token for token"

title "Result"
run "compare" examples/quickstart_summary.py "$OUT" --entropy "$ENTROPY" --stopped-at "$stopped_at"
for timing in "${timings[@]}"; do printf '%6d s  %s\n' "${timing#*=}" "${timing%=*}"; done
printf '%6d s  altogether\n' $((SECONDS - started))
