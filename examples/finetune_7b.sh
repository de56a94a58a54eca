#!/usr/bin/env bash
#SBATCH --job-name=finetune_7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
#
# Fine-tune on a Slurm cluster, for as many lives of the job as it takes.
#
#   sbatch examples/finetune_7b.sh --checkpoint.initialize-from /models/llama --data.train /data/chats.jsonl
#   sbatch --gpus-per-node=1 examples/finetune_7b.sh --config lora_7b_1xh100 --run-dir /runs/a …
#   NPROC_PER_NODE=2 sbatch --nodes=2 --gpus-per-node=0 examples/finetune_7b.sh --config sft_tiny_cpu …     # no GPUs
#   NODES=1 GPUS_PER_NODE=8 examples/finetune_7b.sh --dry-run     # what each node would run; no Slurm needed
#
# Rank 0 encodes the records and imports the weights into the run folder, while the others wait for it there.
#
# Options: --config NAME|FILE …, --run-dir DIR, --dry-run; all others go to `megatron-7b finetune`.
# The same by environment: CONFIG, RUN_DIR, OVERRIDES ("--training.train-steps 10 --training.seed 7"); options win.
# Settings by environment, each explained in docs/slurm.md:
#   LAUNCHER=torchrun            one torchrun on each node; =srun: one task per GPU; =megatron-7b: its own launcher
#   VENV=DIR                     virtual environment; default: .venv of this checkout, where there is one
#   CONTAINER_IMAGE=…            run in this image, by CONTAINER=pyxis (default) or CONTAINER=apptainer
#   CONTAINER_MOUNTS=A,B:C       what else the image must see, such as the data
#   NPROC_PER_NODE=N             N processes per node on CPUs, where nodes have no GPUs
#   NET_IFNAME=ib0               network interface, where host names resolve to another one
#   SRUN_ARGS="…"                further options for srun
#
# The run folder must be on a file system that all nodes share. A life that is about to reach the time limit saves and
# requeues the job; the next one resumes from the run folder. A crash is requeued only after progress.

set -euo pipefail

# Slurm runs a copy of this script out of its spool folder; the library is beside the original, which Slurm knows.
EXAMPLES=${PROJECT_DIR:+$PROJECT_DIR/examples}
EXAMPLES=${EXAMPLES:-$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")}
if [[ ! -f $EXAMPLES/slurm/launch.sh && -n ${SLURM_JOB_ID:-} ]]; then
    submitted=$(scontrol show job --oneliner "$SLURM_JOB_ID")
    submitted=${submitted##* Command=}
    EXAMPLES=$(dirname "${submitted%% *}")
fi
if [[ ! -f $EXAMPLES/slurm/launch.sh ]]; then
    echo "error: no slurm/launch.sh in $EXAMPLES" >&2
    echo "hint: set PROJECT_DIR to the checkout of megatron_7b" >&2
    exit 2
fi
# shellcheck source=examples/slurm/launch.sh
source "$EXAMPLES/slurm/launch.sh"
# shellcheck source=examples/slurm/lives.sh
source "$EXAMPLES/slurm/lives.sh"

read_options "^# Fine-tune" sft_7b_8xh100 "$@"
read_allocation
choose_container
export_environment
trainer=(-m megatron_7b finetune --config "${CONFIGS[@]}" --run-dir "$RUN_DIR" "${OVERRIDE_WORDS[@]}")
if [[ $DEVICE == cpu ]]; then trainer+=(--runtime.device cpu); fi

if [[ $DRY_RUN == yes ]]; then
    print_plan "${trainer[@]}"
else
    run_life "${trainer[@]}"
fi
