#!/usr/bin/env bash
# What srun starts: once for each process (LAUNCHER=srun) or once on each node (the other launchers), in the container
# where there is one. launch.sh exports the settings; the arguments are those of Python. DRY_RUN=yes prints the command.
set -euo pipefail

# Only the trainer knows what SIGUSR1 means, and it installs its own handler. To torchrun, and to a trainer that is
# still importing, it would be death. An ignored signal stays ignored across exec.
trap '' USR1

if [[ -n ${VENV:-} ]]; then export PATH=$VENV/bin:$PATH; fi
python=${PYTHON:-${VENV:+$VENV/bin/}python3}
settings=()
# The node ranks are fixed: neighbours in Slurm's order, which follows the network's topology, stay neighbours in the
# pipeline. Nothing below Slurm restarts anything: it restarts the job, on every node.
case $LAUNCHER in
    torchrun)
        command=("$python" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$NPROC_PER_NODE"
            --node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" "$@")
        ;;
    megatron-7b)
        command=("$python" "$@" --nnodes "$SLURM_JOB_NUM_NODES" --nproc "$NPROC_PER_NODE"
            --node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
        ;;
    srun)
        settings=(RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
            LOCAL_WORLD_SIZE="$NPROC_PER_NODE" MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT")
        command=("$python" "$@")
        ;;
esac

if [[ ${DRY_RUN:-no} == yes ]]; then
    printf '%q ' "${settings[@]}" "${command[@]}"
    echo
    exit
fi
if [[ ! -d $RUN_DIR ]]; then
    echo "error: run folder $RUN_DIR is not there on node $SLURMD_NODENAME" >&2
    echo "hint: it must be on a file system that all nodes share, and in a container be mounted" >&2
    exit 2
fi
exec env "${settings[@]}" "${command[@]}"
