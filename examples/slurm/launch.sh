# shellcheck shell=bash
# From a Slurm allocation to the command that each node runs. Sourced by the batch scripts in examples/.
#
#   read_options HELP CONFIG …  sets CONFIGS, RUN_DIR, DRY_RUN and, of all other options, OVERRIDE_WORDS
#   read_allocation             nodes, processes per node, rendezvous; for a dry run simulated by NODES, GPUS_PER_NODE
#   choose_container            bare, Pyxis or Apptainer
#   export_environment          what the processes need to know, and why
#   build_srun_command ARGS…    sets SRUN_COMMAND; ARGS are those of Python: -m module …
#   print_plan ARGS…            prints what each node would run
#
# Before: EXAMPLES, the folder of the batch script.

usage_error() { # MESSAGE [HINT]
    echo "error: $1" >&2
    if (($# > 1)); then echo "hint: $2" >&2; fi
    exit 2
}

absolute() { # PATH: without asking the disk, since it may not exist yet
    case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac
}

read_options() { # HELP CONFIG OPTIONS…: HELP is how the help in the batch script begins, CONFIG the usual preset
    local help=$1 usual=$2
    shift 2
    read -r -a CONFIGS <<<"${CONFIG:-$usual}"
    read -r -a OVERRIDE_WORDS <<<"${OVERRIDES:-}"
    RUN_DIR=${RUN_DIR:-}
    DRY_RUN=no
    while (($#)); do
        case $1 in
            --config)
                CONFIGS=() && shift
                while (($#)) && [[ $1 != --* ]]; do CONFIGS+=("$1") && shift; done
                ;;
            --run-dir)
                (($# > 1)) || usage_error "--run-dir needs a folder"
                RUN_DIR=$2 && shift 2
                ;;
            --dry-run) DRY_RUN=yes && shift ;;
            -h | --help) sed -n "/$help/,/^\$/s/^# \{0,1\}//p" "${BASH_SOURCE[1]}" && exit ;;
            *) OVERRIDE_WORDS+=("$1") && shift ;;
        esac
    done
    ((${#CONFIGS[@]})) || usage_error "--config needs a preset or a YAML file"
    # The same folder in every life of a job: its number stays when it is requeued.
    RUN_DIR=${RUN_DIR:-runs/$(basename "${CONFIGS[0]}" .yaml)_${SLURM_JOB_ID:-JOB}}
}

read_allocation() {
    PROJECT_DIR=${PROJECT_DIR:-$(dirname "$EXAMPLES")}
    RUN_DIR=$(absolute "$RUN_DIR")
    LAUNCHER=${LAUNCHER:-torchrun}
    case $LAUNCHER in
        torchrun | srun | megatron-7b) ;;
        *) usage_error "LAUNCHER=$LAUNCHER is not one of torchrun, srun, megatron-7b" ;;
    esac
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    elif [[ $DRY_RUN == yes ]]; then
        mapfile -t HOSTS < <(seq -f 'node-%g' "${NODES:-8}")
        GPUS_PER_NODE=${GPUS_PER_NODE:-8}
    else
        usage_error "no Slurm allocation here" \
            "sbatch $0 …, or --dry-run to see the commands, or on one machine: megatron-7b pretrain --nproc N"
    fi
    read_processes_per_node
    # The first node in Slurm's order hosts the rendezvous and rank 0; it is also where the batch script runs.
    MASTER_ADDR=${MASTER_ADDR:-${HOSTS[0]}}
    # From the job's number, because jobs may share a node; moved on by each restart, because a process of the last life
    # may still hold its port. Below the range that kernels give to outgoing connections (32768 and up).
    MASTER_PORT=${MASTER_PORT:-$((20000 + (${SLURM_JOB_ID:-0} + 97 * ${SLURM_RESTART_COUNT:-0}) % 10000))}
}

read_processes_per_node() { # sets DEVICE and NPROC_PER_NODE
    # What was asked for, before what is there (which is all that an exclusive node has, even if none were asked for).
    local gpus=${GPUS_PER_NODE:-${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}}
    gpus=${gpus##*:} # --gpus-per-node=h100:8
    if [[ -n ${NPROC_PER_NODE:-} ]]; then
        DEVICE=cpu
    elif ((gpus > 0)); then
        DEVICE=cuda NPROC_PER_NODE=$gpus
    else
        usage_error "Slurm gave this job no GPUs" \
            "ask for them (sbatch --gpus-per-node=8), or set NPROC_PER_NODE for processes on CPUs"
    fi
    local cores=${SLURM_CPUS_ON_NODE:-$NPROC_PER_NODE}
    ((cores >= NPROC_PER_NODE)) || usage_error "$NPROC_PER_NODE processes per node and only $cores cores of it" \
        "ask for whole nodes (sbatch --exclusive) or for more cores (sbatch --cpus-per-task=$NPROC_PER_NODE)"
}

choose_container() { # sets CONTAINER and the words that go before (Apptainer) or into (Pyxis) the task
    local default=none mounts
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then default=pyxis; fi
    CONTAINER=${CONTAINER:-$default}
    # The same paths inside as outside, so that no path in a configuration or a log needs translating.
    mounts=$(printf '%s\n' "$PROJECT_DIR" "$PWD" "$RUN_DIR" | sort -u | sed 's/.*/&:&/' | paste -sd,)
    mounts+=${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    CONTAINER_SRUN_ARGS=() CONTAINER_COMMAND=()
    case $CONTAINER in
        none)
            if [[ -z ${VENV:-} && -d $PROJECT_DIR/.venv ]]; then VENV=$PROJECT_DIR/.venv; fi
            return
            ;;
        pyxis)
            CONTAINER_SRUN_ARGS=("--container-image=${CONTAINER_IMAGE:-}" "--container-mounts=$mounts"
                "--container-workdir=$PWD")
            ;;
        apptainer)
            CONTAINER_COMMAND=(apptainer exec --bind "$mounts" --pwd "$PWD")
            if [[ $DEVICE == cuda ]]; then CONTAINER_COMMAND+=(--nv); fi
            CONTAINER_COMMAND+=("${CONTAINER_IMAGE:-}")
            ;;
        *) usage_error "CONTAINER=$CONTAINER is not one of none, pyxis, apptainer" ;;
    esac
    [[ -n ${CONTAINER_IMAGE:-} ]] || usage_error "CONTAINER=$CONTAINER without CONTAINER_IMAGE"
}

export_setting() { # NAME VALUE: unless the user has already chosen one
    export "$1=${!1:-$2}"
    SETTINGS+=("$1")
}

export_environment() {
    SETTINGS=()
    local cores=${SLURM_CPUS_ON_NODE:-$(nproc)}
    # torchrun would set one thread per process; a share of the node's cores each keeps them busy and does not fight.
    export_setting OMP_NUM_THREADS $((cores > NPROC_PER_NODE ? cores / NPROC_PER_NODE : 1))
    # A killed process takes what it had buffered with it, and that is the line one looks for.
    export_setting PYTHONUNBUFFERED 1
    # The checkout in front of an installed copy, also in images that have none.
    PYTHONPATH=$PROJECT_DIR${PYTHONPATH:+:$PYTHONPATH}
    export_setting PYTHONPATH ""
    # What task.sh makes its command of.
    export MASTER_ADDR MASTER_PORT NPROC_PER_NODE LAUNCHER RUN_DIR VENV=${VENV:-} PYTHON=${PYTHON:-}
    if [[ $DEVICE == cuda ]]; then
        # One hardware queue: kernels start in the order of launch, so that tensor-parallel communication, launched
        # first, overlaps with the matrix product launched after it rather than waiting for it.
        export_setting CUDA_DEVICE_MAX_CONNECTIONS 1
        # Silent unless something is wrong, and then it names the interface or the peer.
        export_setting NCCL_DEBUG WARN
        # After a timeout each rank writes its last collectives: on the shared disk, since the node may go.
        export_setting TORCH_NCCL_DUMP_ON_TIMEOUT 1
        export_setting TORCH_NCCL_DEBUG_INFO_TEMP_FILE "$RUN_DIR/slurm/nccl_trace_rank_"
    fi
    if [[ -n ${NET_IFNAME:-} ]]; then
        # gloo binds to whatever the host's own name resolves to: on Debian 127.0.1.1, where no other node finds it.
        export_setting GLOO_SOCKET_IFNAME "$NET_IFNAME"
        export_setting NCCL_SOCKET_IFNAME "$NET_IFNAME"
    fi
}

build_srun_command() { # ARGS…: sets SRUN_COMMAND
    local tasks_per_node=1 extra
    if [[ $LAUNCHER == srun ]]; then tasks_per_node=$NPROC_PER_NODE; fi
    read -r -a extra <<<"${SRUN_ARGS:-}"
    SRUN_COMMAND=(srun
        "--nodes=${#HOSTS[@]}" "--ntasks=$((${#HOSTS[@]} * tasks_per_node))" "--ntasks-per-node=$tasks_per_node"
        # One lost rank leaves the others waiting in a collective: end them at once, rather than after its timeout.
        --kill-on-bad-exit=1
        # And one that has finished, while others never will.
        --wait=60
        # Slurm's default binds a task to one core; every process may use its node.
        --cpu-bind=none
        --label
        "${CONTAINER_SRUN_ARGS[@]}" "${extra[@]}" "${CONTAINER_COMMAND[@]}"
        bash "$EXAMPLES/slurm/task.sh" "$@")
    # All GPUs are visible to every task, and LOCAL_RANK chooses: NCCL needs to see its peers' to use NVLink.
    if [[ $DEVICE == cuda ]]; then SRUN_COMMAND=(srun --gpu-bind=none "${SRUN_COMMAND[@]:1}"); fi
}

print_plan() { # ARGS…
    local node name first ranks=$NPROC_PER_NODE world=$((${#HOSTS[@]} * NPROC_PER_NODE))
    build_srun_command "$@"
    echo "# ${#HOSTS[@]} nodes x $ranks processes = $world ranks on $DEVICE, run folder $RUN_DIR"
    echo "# settings of every process:"
    for name in "${SETTINGS[@]}"; do printf 'export %s=%q\n' "$name" "${!name}"; done
    echo "# the batch script runs on ${HOSTS[0]}:"
    printf '%q ' "${SRUN_COMMAND[@]}" && echo
    for node in "${!HOSTS[@]}"; do
        first=$((node * ranks))
        echo "# which on ${HOSTS[node]} runs, for ranks $first to $((first + ranks - 1)):"
        if [[ $LAUNCHER == srun ]] && ((ranks > 1)); then echo "# (RANK and LOCAL_RANK of the first of them)"; fi
        SLURM_NODEID=$node SLURM_LOCALID=0 SLURM_PROCID=$first SLURM_NTASKS=$world SLURM_JOB_NUM_NODES=${#HOSTS[@]} \
            DRY_RUN=yes bash "$EXAMPLES/slurm/task.sh" "$@"
    done
}
