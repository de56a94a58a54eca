#!/usr/bin/env bash
#SBATCH --job-name=preprocess_7b
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=8G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Tokenize a large corpus on a Slurm cluster: an array of shards, then a job that merges them to what one run would write.
#
#   examples/preprocess_7b.sh --shards 64 --input '/raw/*.jsonl' --output-prefix /data/web --tokenizer-model tok --append-eod
#   SBATCH_ARGS="--account=A --partition=cpu --time=4:00:00" examples/preprocess_7b.sh --shards 64 …
#   examples/preprocess_7b.sh --shards 64 … --dry-run             # what would be submitted; no Slurm needed
#   ONLY=3,17 examples/preprocess_7b.sh --shards 64 …             # these shards again, and then the merge
#
# Options: --shards N, --dry-run; all others go to `megatron-7b preprocess`. Run it where sbatch is; it submits itself.
# Settings by environment:
#   SBATCH_ARGS="…"              further options for both jobs
#   MERGE_ARGS="…"               further options for the merge, which needs one core and the disk
#   ONLY=0,5-7                   not all shards (none for the merge alone)
#   LOG_DIR=DIR                  where the jobs' output goes; default: the folder of the output prefix
#   PYTHON=FILE                  interpreter; default: .venv of this checkout, where there is one
#
# A shard that reaches its time limit, is preempted or loses its node is requeued, and continues where it stopped. One that
# has finished is not done again. The merge starts only when all shards are there; the shards stay for you to remove.

set -euo pipefail

usage_error() { # MESSAGE [HINT]
    echo "error: $1" >&2
    if (($# > 1)); then echo "hint: $2" >&2; fi
    exit 2
}

read_arguments() { # ARGS…: sets SHARDS, DRY_RUN, PREFIX and ARGUMENTS
    SHARDS='' DRY_RUN=no PREFIX='' ARGUMENTS=()
    while (($#)); do
        case $1 in
            --shards)
                (($# > 1)) || usage_error "--shards needs a number"
                SHARDS=$2 && shift 2
                ;;
            --dry-run) DRY_RUN=yes && shift ;;
            -h | --help) sed -n '/^# Tokenize/,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
            --shard | --shard=*) usage_error "$1 is for this script to say" "--shards N says how many there are" ;;
            --output-prefix)
                (($# > 1)) || usage_error "--output-prefix needs a path"
                PREFIX=$2 && ARGUMENTS+=("$1" "$2") && shift 2
                ;;
            --output-prefix=*) PREFIX=${1#*=} && ARGUMENTS+=("$1") && shift ;;
            *) ARGUMENTS+=("$1") && shift ;;
        esac
    done
    [[ $SHARDS =~ ^[1-9][0-9]*$ ]] || usage_error "--shards is ${SHARDS:-missing}, expected a number from 1 on"
    [[ -n $PREFIX ]] || usage_error "--output-prefix is missing"
}

submit() { # submits the array and the merge, or shows them
    local array shards_command merge_command options merge_options only=${ONLY:-0-$((SHARDS - 1))}
    read -r -a options <<<"${SBATCH_ARGS:-}"
    read -r -a merge_options <<<"${MERGE_ARGS:-}"
    LOG_DIR=${LOG_DIR:-$(dirname "$PREFIX")}
    shards_command=(sbatch --parsable "--array=$only" "--output=$LOG_DIR/%x_%A_%a.log" "${options[@]}"
        "$SCRIPT" --shards "$SHARDS" "${ARGUMENTS[@]}")
    merge_command=(sbatch --parsable "--output=$LOG_DIR/%x_%j.log" --job-name=merge_7b --cpus-per-task=1
        "${options[@]}" "${merge_options[@]}")
    if [[ $DRY_RUN == yes ]]; then
        if [[ $only != none ]]; then
            echo "# $SHARDS shards; each task runs:"
            printf '%q ' "${PREPROCESS[@]}" "${ARGUMENTS[@]}" --shard "I/$SHARDS" && echo
            printf '%q ' "${shards_command[@]}" && echo
            merge_command+=(--dependency=afterok:ARRAY --kill-on-invalid-dep=yes)
        fi
        echo "# then one job merges them:"
        printf '%q ' "${merge_command[@]}" "$SCRIPT" --shards "$SHARDS" --output-prefix "$PREFIX" && echo
        return
    fi
    command -v sbatch >/dev/null || usage_error "no sbatch here" \
        "--dry-run shows the jobs; on one machine: megatron-7b preprocess without --shard"
    # Slurm runs a copy of this script out of its spool folder: what it needs of its own place goes with the environment.
    export PROJECT_DIR PYTHON
    mkdir -p "$LOG_DIR"
    if [[ $only != none ]]; then
        array=$("${shards_command[@]}")
        echo "shards: job ${array%%;*}"
        merge_command+=("--dependency=afterok:${array%%;*}" --kill-on-invalid-dep=yes)
    fi
    echo "merge: job $(MERGE=yes "${merge_command[@]}" "$SCRIPT" --shards "$SHARDS" --output-prefix "$PREFIX")"
}

run_shard() { # one task of the array
    local child code=0
    "${PREPROCESS[@]}" "${ARGUMENTS[@]}" --shard "$SLURM_ARRAY_TASK_ID/$SHARDS" &
    child=$!
    # The time limit is near: end the run, whose journal keeps what it has done, and let the job come back.
    trap 'STOPPED=yes; kill "$child" 2>/dev/null || true' USR1 TERM
    STOPPED=no
    wait "$child" || code=$?
    if [[ $STOPPED == yes ]]; then
        wait "$child" || code=$?
        if ((code != 0)); then
            echo "stopped before its time limit: requeued, to continue"
            scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
        fi
    fi
    exit "$code"
}

merge_shards() { # every corpus that the shards wrote, one per key
    local first kind parts last
    last=$(printf '%05d' "$SHARDS")
    shopt -s nullglob
    local found=("${PREFIX}_00000-of-${last}_"*.idx)
    ((${#found[@]})) || usage_error "no shard 0 of $SHARDS at $PREFIX" "write the shards first"
    for first in "${found[@]}"; do
        kind=${first#"${PREFIX}_00000-of-${last}_"}
        parts=("${PREFIX}_"[0-9][0-9][0-9][0-9][0-9]"-of-${last}_$kind")
        "$PYTHON" -m megatron_7b data merge "${parts[@]}" --output "${PREFIX}_${kind%.idx}"
    done
}

SCRIPT=$(readlink -f "${BASH_SOURCE[0]}")
PROJECT_DIR=${PROJECT_DIR:-$(dirname "$(dirname "$SCRIPT")")}
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x $PROJECT_DIR/.venv/bin/python ]]; then PYTHON=$PROJECT_DIR/.venv/bin/python; fi
fi
export PYTHONPATH=$PROJECT_DIR${PYTHONPATH:+:$PYTHONPATH}
PREPROCESS=("$PYTHON" -m megatron_7b preprocess)

read_arguments "$@"
if [[ ${MERGE:-no} == yes && -n ${SLURM_JOB_ID:-} ]]; then
    merge_shards
elif [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    run_shard
else
    submit
fi
