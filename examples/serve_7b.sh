#!/usr/bin/env bash
#SBATCH --job-name=serve_7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@60
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
#
# Serve a checkpoint on a Slurm cluster, behind a key, for OpenAI's clients.
#
#   sbatch examples/serve_7b.sh --checkpoint /runs/a
#   sbatch --gpus-per-node=4 examples/serve_7b.sh --checkpoint /runs/a --adapter law=/runs/law --max-batch-size 64
#   NPROC_PER_NODE=1 sbatch --gpus-per-node=0 examples/serve_7b.sh --checkpoint /runs/a     # no GPUs
#   GPUS_PER_NODE=4 NODES=1 examples/serve_7b.sh --checkpoint /runs/a --dry-run             # what would run; no Slurm needed
#
# All GPUs of the job share one copy of the model (tensor parallelism); --parallel.… says otherwise. The folder RUN_DIR
# gets a file `key` (unless --api-key-file names one), and the log says how to reach the server from elsewhere.
#
# Options: --run-dir DIR, --dry-run; all others go to `megatron-7b serve`.
# Settings by environment, each explained in docs/slurm.md:
#   PORT=8000                    where the server listens
#   VENV=DIR                     virtual environment; default: .venv of this checkout, where there is one
#   CONTAINER_IMAGE=…            run in this image, by CONTAINER=pyxis (default) or CONTAINER=apptainer
#   CONTAINER_MOUNTS=A,B:C       what else the image must see, such as the checkpoint
#   NPROC_PER_NODE=N             N processes per node on CPUs, where nodes have no GPUs
#   NET_IFNAME=ib0               network interface, where host names resolve to another one
#   SRUN_ARGS="…"                further options for srun
#
# A minute before its time limit, and after scancel, the server takes nothing new and finishes what runs.

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

read_options "^# Serve" serve_7b "$@"
# Our own launcher hands SIGTERM on and ends with the server's exit code; torchrun would make a failure of it.
LAUNCHER=megatron-7b
PORT=${PORT:-8000}
read_allocation
choose_container
export_environment

words=" ${OVERRIDE_WORDS[*]} "
server=(-m megatron_7b serve --host 0.0.0.0 --port "$PORT" "${OVERRIDE_WORDS[@]}")
if [[ $words != *" --api-key-file"* ]]; then server+=(--api-key-file "$RUN_DIR/key"); fi
if [[ $words != *" --parallel."* ]]; then
    server+=(--parallel.tensor-model-parallel-size $((${#HOSTS[@]} * NPROC_PER_NODE)))
fi
if [[ $DEVICE == cpu ]]; then server+=(--runtime.device cpu); fi

if [[ $DRY_RUN == yes ]]; then
    print_plan "${server[@]}"
    exit
fi
mkdir -p "$RUN_DIR/slurm"
if [[ $words != *" --api-key-file"* && ! -e $RUN_DIR/key ]]; then
    (umask 077 && head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n' >"$RUN_DIR/key")
fi
echo "from elsewhere: ssh -L $PORT:${HOSTS[0]}:$PORT THIS_CLUSTER, then http://localhost:$PORT with the key of $RUN_DIR/key"
build_srun_command "${server[@]}"
exec "${SRUN_COMMAND[@]}"
