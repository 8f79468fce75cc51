# shellcheck shell=bash disable=SC2154,SC2086,SC2068,SC2206,SC2012,SC2016
# The constant part of the batch script; slurm_script.py writes the part before it, which assigns
# what differs between jobs. Process IDs and patterns are split into words on purpose.
work=/tmp/revcol-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token" PYTHONUNBUFFERED=1
driver='' head='' others=''

# The driver takes USR1 and TERM alike; only USR1 passes through srun unchanged.
ask_driver() { stopping=yes; [[ -z $driver ]] || kill -USR1 "$driver" 2>/dev/null; }
trap ask_driver TERM USR1

# Exit status of a child, however often a signal interrupts the wait.
await() {
    local status
    while wait "$1"; status=$?; ((status > 128)) && kill -0 "$1" 2>/dev/null; do :; done
    ((status <= 128)) || { wait "$1"; ((status = $? == 127 ? status : $?)); }
    return "$status"
}

# Wait up to $1 tenths of a second for the end of the other children.
await_end() {
    local tenths pid alive
    for ((tenths = $1; tenths > 0; tenths--)); do
        alive=
        for pid in $head $others; do kill -0 "$pid" 2>/dev/null && alive=yes; done
        [[ -n $alive ]] || return 0
        sleep 0.1
    done
    return 1
}

# The other machines notice the end of the head.
clean_up() {
    [[ -z $head ]] || kill -USR2 "$head" 2>/dev/null
    await_end 200 || { kill -KILL $head $others; wait; } 2>/dev/null
    rm -rf "$work" "$token"
}

# True if the next attempt may get further than this one and the user has not ended the job.
may_requeue() {
    # A step inside of the user's own allocation has an ID.
    [[ -z ${SLURM_STEP_ID:-} && ! -e $stop_mark ]] || return 1
    # COMPLETING: Slurm ends the job itself. It requeues a preempted one, and must not be made to
    # requeue one that the user has cancelled.
    [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]] || return 1
    local count=0 before='' now
    now=$(cd "$run" && ls -d ${progress[@]} 2>/dev/null | cksum)
    [[ ! -r $requeues ]] || { read -r count; read -r before; } <"$requeues"
    if [[ $now == "$before" ]]; then ((count += 1)); else count=0; fi
    printf '%s\n%s\n' "$count" "$now" >"$requeues.$$" && mv "$requeues.$$" "$requeues"
    ((count < requeue_limit)) && return 0
    echo "not requeued: $count attempts in a row without a new checkpoint" >&2
    return 1
}

mkdir -p "${log%/*}" && exec >>"$log" 2>&1 || exit 3
set_up || { echo "error: a line of cluster.slurm.setup failed" >&2; exit 2; }
rm -rf /tmp/revcol-"$SLURM_JOB_ID".*  # of an attempt that was killed
(umask 077; od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >"$token.$$") && mv "$token.$$" "$token"

cpus=$((SLURM_CPUS_ON_NODE > devices ? SLURM_CPUS_ON_NODE : devices))
node=(--directory "$work" --grace "$grace" --cpus "$cpus")
"${here[@]}" "${pipeline[@]}" node head --no-dashboard "${node[@]}" >>"$machines_log" 2>&1 &
head=$!
until [[ -s $work/address.json ]]; do
    if ! kill -0 "$head" 2>/dev/null; then
        [[ -n ${stopping:-} ]] && { driver_status=75; break; }
        tail -n 20 "$machines_log" >&2
        clean_up
        exit 3
    fi
    [[ -z ${stopping:-} ]] || { driver_status=75; break; }
    sleep 0.2
done

if [[ -z ${driver_status:-} ]]; then
    gcs=$(sed -n 's/.*"gcs": *"\([^"]*\)".*/\1/p' "$work/address.json")
    export PIPELINE_RAY_ADDRESS="$gcs"
    PIPELINE_MACHINES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
    export PIPELINE_MACHINES
    logged=$(wc -l <"$machines_log")  # lines before srun, those of earlier attempts too
    if ((SLURM_JOB_NUM_NODES > 1)); then
        count=$((SLURM_JOB_NUM_NODES - 1))
        export -f set_up
        export code work
        srun --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --exclude="$SLURMD_NODENAME" \
            --no-kill --kill-on-bad-exit=0 --wait=0 "${step_options[@]}" \
            bash -c 'set_up && rm -rf "${work%.*}".* && exec "$@"' set_up \
            "${in_step[@]}" "${pipeline[@]}" node join "$gcs" "${node[@]}" \
            </dev/null >>"$machines_log" 2>&1 &
        others=$!
    fi
    write_job >"$work/job.yaml"
    "${here[@]}" "${pipeline[@]}" "$verb" "$work/job.yaml" "${options[@]}" &
    driver=$!
    [[ -z ${stopping:-} ]] || ask_driver
    await "$driver"
    driver_status=$?
    # Why a machine has not joined, or was lost: the driver cannot know what Slurm says about it.
    ((driver_status == 0)) ||
        tail -n "+$((logged + 1))" "$machines_log" | grep '^srun: error: ' | tail -n 5
fi
clean_up
if ((driver_status == 75)) && may_requeue; then
    trap - TERM USR1
    scontrol requeue "$SLURM_JOB_ID"  # ends this script
fi
exit "$driver_status"
