#!/usr/bin/env bash
# The whole road on real text, in a few minutes on two CPU cores: State of the Union speeches -> tokenizer -> tokens ->
# training with tensor parallelism on two processes -> stop, resume with another layout -> Hugging Face -> text.
#
#   make quickstart                                 # sets everything up first
#   make quickstart FRESH=1                         # starts over
#   examples/quickstart.sh [--fresh] [FOLDER]       # with the environment that is there; default: quickstart_run
#
# Every command is shown as you would type it. Interrupted or killed, the same command continues with what is done. The
# number of training steps is chosen for this machine: a trial of a few steps is timed, and FOLDER/plan keeps the choice.
# Any failure ends the script with a non-zero status, and so does a model whose validation loss is not below the unigram
# entropy of the corpus by what that many steps must reach.
set -euo pipefail
{ # read as a whole before it runs: an update of the file must not change a run in progress
cd "$(dirname "$0")/.."
if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi

# Libraries' notes on what is not installed, and their progress bars, would hide the commands.
export PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1
# Commands end with this script, even if it is killed: a training that is left running would hold its run folder.
GUARD=()
if setpriv --pdeathsig KILL true 2>/dev/null; then
    # The script may be gone before the signal is asked for: then nothing begins.
    # shellcheck disable=SC2016 # the inner shell expands these
    GUARD=(setpriv --pdeathsig KILL sh -c '[ "$PPID" = "$0" ] && exec "$@"' $$)
fi

FRESH=""
if [ "${1:-}" = --fresh ]; then
    FRESH=yes
    shift
fi
OUT=${1:-quickstart_run}
DONE=$OUT/done
PROMPT="My fellow citizens of the"
AGAIN="the same command continues from here"

if [ -t 1 ]; then BOLD=$'\033[1m' BLUE=$'\033[36m' PLAIN=$'\033[0m'; else BOLD="" BLUE="" PLAIN=""; fi
[ -z "${NO_COLOR:-}" ] || BOLD="" BLUE="" PLAIN=""

fail() {
    printf '\nquickstart: %s\n' "$*" >&2
    exit 1
}

trainer="" finished=""
# shellcheck disable=SC2329 # the traps below call it
leave() {
    local status=$?
    trap - EXIT INT TERM
    if [ -n "$trainer" ]; then
        kill -TERM "$trainer" 2>/dev/null || true # it saves
        wait "$trainer" || true
    fi
    [ -n "$finished" ] || printf '\nquickstart: not finished (exit code %d); %s\n' "$status" "$AGAIN" >&2
    exit "$status"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ------------------------------------------------------------------------------------- stages: what is done, what is left

STAGES=(text tokenizer tokens trial tensor pipeline convert ours transformers)
declare -A SECONDS_OF # expected, until a stage has been measured

is_done() { [ -f "$DONE/$1" ]; }

format_seconds() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

seconds_left() {
    local stage sum=0
    for stage in "${STAGES[@]}"; do is_done "$stage" || sum=$((sum + SECONDS_OF[$stage])); done
    echo $sum
}

# What stages take follows from how long a command takes to start, and from the plan, once there is one.
expect() {
    local start=$1 training=$2
    SECONDS_OF=([text]=5 [tokenizer]=$((3 + start / 2)) [tokens]=$((2 + start / 2)) [trial]=$((start + 8))
        [tensor]=$((start + training / 2)) [pipeline]=$((start + training / 2 + 5)) [convert]=$((2 * start))
        [ours]=$start [transformers]=$start)
}

# Begin a stage: begin NAME TITLE; false if it is done already.
begin() {
    local number=1
    while [ "${STAGES[$((number - 1))]}" != "$1" ]; do number=$((number + 1)); done
    if is_done "$1"; then
        printf '%s── %d/%d %s%s: done\n' "$BOLD" $number ${#STAGES[@]} "$2" "$PLAIN"
        return 1
    fi
    printf '\n%s── %d/%d %s%s (about %s left)\n' "$BOLD" $number ${#STAGES[@]} "$2" "$PLAIN" "$(format_seconds "$(seconds_left)")"
    stage_began=$SECONDS
}

# End a stage: from now on it is not repeated.
end() {
    echo $((SECONDS - stage_began)) >"$DONE/.$1"
    mv "$DONE/.$1" "$DONE/$1"
}

# Show a command as it would be typed (arguments that need no quotes get none), and run it.
show() {
    local word line=""
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@+-]+$ ]]; then line+=" $word"; else line+=" \"$word\""; fi
    done
    printf '%s$%s%s\n' "$BLUE" "$line" "$PLAIN"
}
run() {
    show "$@"
    "${GUARD[@]}" "$@"
}

# --------------------------------------------------------------------------------------------------- the folder of the run

if [ -d "$OUT" ] && [ ! -d "$DONE" ] && [ -n "$(ls -A "$OUT")" ] && [ ! -f "$OUT/sotu.jsonl" ]; then
    AGAIN="nothing was changed"
    fail "$OUT holds something else than a quickstart; give another FOLDER"
fi
if [ -n "$FRESH" ] || { [ -d "$OUT" ] && [ ! -d "$DONE" ]; }; then rm -rf "$OUT"; fi
mkdir -p "$DONE"

echo "quickstart: looking how fast this machine is"
before=${EPOCHREALTIME/./}
python -c 'import torch' # what every command that computes begins with; also reads the files into memory
import_seconds=$(((${EPOCHREALTIME/./} - before) / 1000000 + 1))
expect $((2 * import_seconds + 2)) 150
# shellcheck disable=SC1091 # written below: STEPS BATCH WARMUP MARGIN START_SECONDS TRAINING_SECONDS
if [ -f "$OUT/plan" ]; then
    . "$OUT/plan"
    expect "$START_SECONDS" "$TRAINING_SECONDS"
    [ "${QUICKSTART_STEPS:-$STEPS}" = "$STEPS" ] || fail "$OUT is a quickstart of $STEPS steps; --fresh starts over"
    echo "continuing in $OUT, about $(format_seconds "$(seconds_left)") left; make quickstart FRESH=1 starts over"
else
    echo "this takes about $(format_seconds "$(seconds_left)") on this machine; a trial of a few steps will tell more exactly"
fi

# ---------------------------------------------------------------------------------------------------------------- the road

if begin text "Real text: the State of the Union speeches, as JSON lines"; then
    run tools/fetch_sotu.py "$OUT/sotu.jsonl"
    end text
fi

if begin tokenizer "A byte-level BPE of 8,192 tokens, trained on it"; then
    rm -rf "$OUT/tokenizer"
    run megatron-7b tokenizer train --input "$OUT/sotu.jsonl" --vocab-size 8192 --output "$OUT/tokenizer"
    end tokenizer
fi

DATA=$OUT/sotu_text_document
if begin tokens "Text to tokens, in Megatron's .bin/.idx format"; then
    run tools/preprocess_data.py --input "$OUT/sotu.jsonl" --output-prefix "$OUT/sotu" \
        --tokenizer-model "$OUT/tokenizer" --append-eod --workers 2
    run megatron-7b data show "$DATA" --documents 1
    show tools/unigram_entropy.py "$DATA"
    tools/unigram_entropy.py "$DATA" >"$OUT/entropy"
    echo "$(<"$OUT/entropy") nats per token: the loss of a model that knows how often each token occurs, and nothing else"
    end tokens
fi

PRETRAIN=(megatron-7b pretrain --config tiny_cpu --nproc 2 --data.train "$DATA")
TENSOR=(--parallel.tensor-model-parallel-size 2)
if begin trial "How fast is this machine? A trial of four steps"; then
    rm -rf "$OUT/trial"
    run "${PRETRAIN[@]}" --run-dir "$OUT/trial" "${TENSOR[@]}" --training.train-steps 4 --training.eval-steps 1 \
        --telemetry.tensorboard False --telemetry.plot False
    examples/quickstart_plan.py "$OUT/trial/metrics.jsonl" --seconds $((SECONDS - stage_began)) \
        ${QUICKSTART_STEPS:+--steps "$QUICKSTART_STEPS"} --write "$OUT/plan"
    rm -rf "$OUT/trial"
    end trial
fi
# shellcheck disable=SC1091
. "$OUT/plan"
expect "$START_SECONDS" "$TRAINING_SECONDS"
STOP_AT=$((STEPS / 2))

# Both legs of the training are this command; they differ in their layout alone.
PRETRAIN+=(--run-dir "$OUT/run" --training.train-steps "$STEPS" --training.global-batch-size "$BATCH" --optimizer.lr-warmup-steps "$WARMUP"
    --training.eval-interval-steps "$STOP_AT" --checkpoint.save-interval-steps $((STEPS / 5)))
PIPELINE=(--parallel.pipeline-model-parallel-size 2 --training.micro-batch-size 4) # more microbatches, less waiting

newest_checkpoint() {
    local target
    target=$(readlink "$OUT/run/checkpoints/latest") || target=step_0
    echo $((10#${target#step_}))
}
steps_done() { grep -c '"loss"' "$OUT/run/metrics.jsonl" 2>/dev/null || true; }
metrics_file() { stat -c %i "$OUT/run/metrics.jsonl" 2>/dev/null || true; }

if begin tensor "Training with tensor parallelism on two processes; half-way a SIGTERM, as a cluster would send it"; then
    if [ "$(newest_checkpoint)" -lt "$STOP_AT" ]; then # else killed between saving and noting it
        show "${PRETRAIN[@]}" "${TENSOR[@]}"
        former=$(metrics_file) # a start replaces the file by the steps up to its checkpoint
        "${GUARD[@]}" "${PRETRAIN[@]}" "${TENSOR[@]}" &
        trainer=$!
        until [ "$(metrics_file)" != "$former" ] && [ "$(steps_done)" -ge "$STOP_AT" ]; do
            kill -0 $trainer 2>/dev/null || break
            sleep 0.2
        done
        show kill -TERM $trainer
        kill -TERM $trainer 2>/dev/null || true
        status=0
        wait $trainer || status=$?
        trainer=""
        [ $status = 75 ] || fail "the stopped run left with exit code $status; 75 (saved, resume me) was expected"
        echo "exit code 75 after $(newest_checkpoint) steps: saved, resume me"
    fi
    newest_checkpoint >"$OUT/stopped_at"
    end tensor
fi

if begin pipeline "The same run, resumed with pipeline parallelism"; then
    run "${PRETRAIN[@]}" "${PIPELINE[@]}"
    end pipeline
fi

if begin convert "To Hugging Face; refused unless both models give the same logits"; then
    rm -rf "$OUT/hf"
    run megatron-7b convert to-hf --checkpoint "$OUT/run/checkpoints/latest" --output "$OUT/hf"
    end convert
fi

if begin ours "Text from the training checkpoint"; then
    words=(megatron-7b generate --checkpoint "$OUT/run/checkpoints/latest" --prompt "$PROMPT" --max-new-tokens 24 --greedy)
    show "${words[@]}"
    "${GUARD[@]}" "${words[@]}" | tee "$OUT/ours.txt"
    end ours
fi

# In FP32 like ours: where a machine trains in BF16, transformers would also compute in it, and words that are almost
# equally likely could change places.
if begin transformers "Text from the converted folder, by transformers"; then
    words=(python -c "from transformers import pipeline; \
print(pipeline('text-generation', '$OUT/hf', dtype='float32')('$PROMPT', max_new_tokens=24, do_sample=False)[0]['generated_text'])")
    show "${words[@]}"
    "${GUARD[@]}" "${words[@]}" | tee "$OUT/transformers.txt"
    end transformers
fi

printf '\n%s── Result%s\n' "$BOLD" "$PLAIN"
if ! cmp -s "$OUT/ours.txt" "$OUT/transformers.txt"; then
    rm -f "$DONE/ours" "$DONE/transformers" # not done after all: the same command writes both again
    fail "the two texts differ: $OUT/ours.txt and $OUT/transformers.txt"
fi
echo "both texts are the same, token for token"
examples/quickstart_summary.py "$OUT" --entropy "$(<"$OUT/entropy")" --stopped-at "$(<"$OUT/stopped_at")" "--margin=$MARGIN"
sum=0
for stage in "${STAGES[@]}"; do
    printf '%6d s  %s\n' "$(<"$DONE/$stage")" "$stage"
    sum=$((sum + $(<"$DONE/$stage")))
done
printf '%6d s  altogether\n' $sum
echo "$OUT/run/loss.png shows the loss; make quickstart FRESH=1 does it all again"
finished=yes
exit 0
}
