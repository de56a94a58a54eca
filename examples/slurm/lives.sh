# shellcheck shell=bash
# One job, several lives: stop before the time limit, learn how the trainer ended, requeue or give up. Sourced by the
# batch scripts in examples/ after launch.sh; `run_life ARGS…` is all of it.
#
# Contract with the trainer. On SIGUSR1 (or SIGTERM) to any rank it finishes the step, saves, and every rank exits with
# 75; before its first step the rank exits with 75 at once. 0 means finished, anything else failed. Because torchrun
# turns every child's failure into 1, rank 0 also writes RUN_DIR/status.json:
# {"state": "saved"|"stopped"|"finished"|"failed", "exit_code": 75|75|0|…, "step": n}.
# To Slurm, exit 0 means that the job is complete and never comes back: hence the distinct code, and hence the requeue
# by this script.

readonly SAVED=75 OVERDUE=124
MAX_STALLED_LIVES=${MAX_STALLED_LIVES:-2}

STOP_REPEAT_SECONDS=${STOP_REPEAT_SECONDS:-10}

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID life ${SLURM_RESTART_COUNT:-0}: $*"; }

job_field() { # NAME: what Slurm says about this job; nothing where it does not answer
    { scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null || true; } | sed -n "s/.* $1=\\([^ ]*\\) .*/\\1/p"
}

latest_step() { # the step of the newest complete checkpoint; -1 where there is none
    local latest=$RUN_DIR/checkpoints/latest name=
    if [[ -L $latest ]]; then name=$(readlink "$latest"); elif [[ -f $latest ]]; then name=$(<"$latest"); fi
    if [[ $name =~ step_([0-9]+) ]]; then echo "$((10#${BASH_REMATCH[1]}))"; else echo -1; fi
}

trainer_exit_code() { # SRUN_CODE: what the trainer meant
    local written=
    if [[ -f $RUN_DIR/status.json ]]; then
        written=$(sed -n 's/.*"exit_code": *\([0-9]\+\).*/\1/p' "$RUN_DIR/status.json")
    fi
    if (($1 != 0)) && [[ -n $written && $written != 0 ]]; then echo "$written"; else echo "$1"; fi
}

verdict() { # CODE FIRST_STEP LAST_STEP STALLED_LIVES: done, requeue or fail
    if (($1 == 0)); then
        echo "done"
    elif (($3 > $2)); then
        # There is a newer checkpoint than this life began with, so that the next one will get further. That also holds
        # for a crash, and it bounds the lives: one that dies twice at the same place has no progress the second time.
        echo requeue
    elif (($1 == SAVED && $4 < MAX_STALLED_LIVES)); then
        echo requeue # told to stop before its first step was done: no fault of its own, but not for ever
    else
        echo fail
    fi
}

stalled_lives() { # how many of this job's last lives, in a row, brought no newer checkpoint
    awk -v job="$SLURM_JOB_ID" '$2 == job { n = ($5 > $4) ? 0 : n + 1 } END { print n + 0 }' "$RUN_DIR/slurm/lives.tsv"
}

take_run_folder() { # two jobs that write to one run folder would destroy it
    local owner=$RUN_DIR/slurm/job other=
    mkdir -p "$RUN_DIR/slurm"
    if [[ -f $owner ]]; then other=$(<"$owner"); fi
    if [[ -n $other && $other != "$SLURM_JOB_ID" ]]; then
        # The last of a chain of jobs may still be tidying up.
        while [[ $(squeue -h -j "$other" -o %T 2>/dev/null) == COMPLETING ]]; do sleep 2; done
        if [[ -n $(squeue -h -j "$other" 2>/dev/null) ]]; then
            usage_error "job $other trains in $RUN_DIR" "wait for it, cancel it, or choose another --run-dir"
        fi
    fi
    echo "$SLURM_JOB_ID" >"$owner"
    if [[ ! -f $RUN_DIR/slurm/lives.tsv ]]; then
        printf 'ended\tjob\tlife\tfirst_step\tlast_step\texit_code\tverdict\n' >"$RUN_DIR/slurm/lives.tsv"
    fi
    # What it says from now on, this life has said.
    rm -f "$RUN_DIR/status.json"
}

rank_zero_pid() { # rank 0 runs on this node; its own children inherit its environment, so look for the eldest
    local pid parent
    is_rank_zero() { grep -qzx 'RANK=0' "/proc/$1/environ" 2>/dev/null; }
    for pid in $(scontrol listpids "$SLURM_JOB_ID" 2>/dev/null | awk '$3 ~ /^[0-9]+$/ { print $1 }'); do
        parent=$(sed -n 's/^PPid:\t//p' "/proc/$pid/status" 2>/dev/null)
        if is_rank_zero "$pid" && ! is_rank_zero "$parent"; then
            echo "$pid"
            return 0 # bare, inside a trap, it would return what came before the trap
        fi
    done
    return 1
}

ask_to_stop() { # ATTEMPT
    local pid
    # To rank 0 only: the ranks agree among themselves. Slurm would signal every process of the step, and those that a
    # rank has spawned to write a checkpoint, with no handler of their own, would die of it in the middle of the write.
    if pid=$(rank_zero_pid); then
        kill -USR1 "$pid" || true # gone in the meantime
    elif (($1 >= 3)); then
        kill -USR1 "$SRUN_PID" || true # it is there by now, and hidden from us: then to all
    fi
}

stop_trainer() { # the trap on SIGUSR1, which Slurm sends to this script alone
    local end now deadline attempt
    end=$(job_field EndTime)
    say "told to stop; the time limit is at $end"
    if [[ -n $STOPPER_PID ]]; then return 0; fi
    now=$(date +%s)
    end=$(date -d "$end" +%s 2>/dev/null) || end=$((now + 1000000000)) # no limit
    deadline=$((now + (end - now) * 4 / 5))
    (
        # Again and again: a trainer is deaf in its first second, and one that has heard does not mind.
        for ((attempt = 0; $(date +%s) < deadline; attempt++)); do
            ask_to_stop "$attempt"
            sleep "$STOP_REPEAT_SECONDS"
        done
        # A trainer that hangs must not run into the limit: there Slurm would end the job for good.
        kill -ALRM $$
    ) &
    STOPPER_PID=$!
}

wait_for_trainer() { # sets CODE
    local interrupted=yes code
    CODE='' STOPPER_PID=''
    trap 'interrupted=yes; stop_trainer' USR1
    trap 'interrupted=yes; CODE=$OVERDUE; say "did not save in time"' ALRM
    # scancel, preemption, requeue: the tasks get it too, and may still save.
    trap 'interrupted=yes; say "Slurm ends the job"' TERM
    # A trap interrupts `wait`, which then returns a code of its own while srun continues; asked again it tells srun's.
    while [[ -n $interrupted && -z $CODE ]]; do
        interrupted='' code=0
        wait "$SRUN_PID" || code=$?
    done
    trap '' USR1 ALRM
    if [[ -n $STOPPER_PID ]]; then kill "$STOPPER_PID" 2>/dev/null || true; fi
    CODE=${CODE:-$(trainer_exit_code "$code")}
}

run_life() { # ARGS…: the whole of a batch script; exits
    local first last outcome state
    take_run_folder
    first=$(latest_step)
    say "${#HOSTS[@]} nodes ($SLURM_JOB_NODELIST) x $NPROC_PER_NODE $DEVICE, run folder $RUN_DIR, newest step $first"
    build_srun_command "$@"
    "${SRUN_COMMAND[@]}" &
    SRUN_PID=$!
    wait_for_trainer
    last=$(latest_step)
    # No verdict of ours on what Slurm is already ending: a cancelled job would rise from the dead.
    state=$(job_field JobState)
    while [[ -z $state ]]; do # Slurm's controller is being restarted; the job lives on meanwhile
        sleep 10
        state=$(job_field JobState)
    done
    if [[ $state == RUNNING ]]; then
        outcome=$(verdict "$CODE" "$first" "$last" "$(stalled_lives)")
    else
        outcome=ended_by_slurm
    fi
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$(date '+%FT%T')" "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" \
        "$first" "$last" "$CODE" "$outcome" >>"$RUN_DIR/slurm/lives.tsv"
    say "trainer ended with $CODE after steps $first to $last: $outcome"
    if [[ $outcome == requeue ]] && ! scontrol requeue "$SLURM_JOB_ID"; then
        say "Slurm refused to requeue; sbatch the same command again to go on"
    elif [[ $outcome == requeue ]]; then
        exit 0 # of no account any more: the job is already on its way back into the queue
    fi
    exit "$CODE"
}
