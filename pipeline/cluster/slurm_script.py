"""Renders the batch script of a run under Slurm.

The script runs on the first machine. Its three children, and how they end:

    head     Ray's head, through ``pipeline node head``
    others   one step of srun with a task per other machine: ``pipeline node join``
    driver   ``pipeline run JOB``, as on one machine, with the address of the head

1. Slurm asks for an end with USR1 (before the time limit) or TERM (preemption, scancel). The driver
   gets USR1, saves and ends with 75. The other two have TERM and USR1 blocked, so that Ray lives
   until then.
2. Whatever ended the driver, the head is asked to end. The other machines notice that, end Ray and
   remove their files.
3. After 75, ``scontrol requeue`` is the very last act: Slurm ends the job at once. Not if the user
   has stopped or cancelled it, nor after several attempts without progress.

Everything that differs between jobs is a quoted assignment at the top; the rest is constant.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.launcher import Submission
from pipeline.config.schema import ClusterConfig
from pipeline.files import digest
from pipeline.layout import RunDir

REQUEUES = 3  # attempts in a row without progress, after which the job is not requeued
_WARNING_S = 60  # Slurm may send a signal up to a minute late
_PACKAGE = Path(__file__).resolve().parents[2]


def render(submission: Submission) -> str:
    """The batch script of a submission. The same for the same job; holds no secret."""
    options = [f"#SBATCH {option}" for option in sbatch_options(submission)]
    return "\n".join(["#!/bin/bash", *options, *_assignments(submission), _BODY])


def sbatch_options(submission: Submission) -> list[str]:
    """Options of sbatch, each quoted for a line of a script."""
    cluster = submission.cluster
    slurm = cluster.slurm
    options = {
        "job-name": submission.name,
        "output": _output(submission),
        "open-mode": "append",
        "nodes": str(cluster.nodes),
        "ntasks-per-node": "1",
        **_resources(cluster),
        "time": slurm.time,
        "signal": f"B:USR1@{cluster.grace + _WARNING_S}",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
    }
    lines = [f"--{name}={_quoted(value)}" for name, value in options.items() if value]
    lines.append("--requeue")
    if cluster.fewest_nodes < cluster.nodes:
        lines.append("--no-kill")  # the loss of a machine does not end the job
    # The last of two equal options counts, so the user's come last.
    for option in slurm.extra:
        name, equals, value = option.partition("=")
        lines.append(f"{name}={_quoted(value)}" if equals else name)
    return lines


def _output(submission: Submission) -> str:
    """Where Slurm writes: into the log, unless its folder cannot be created from this machine.

    The script itself writes into the log in any case.
    """
    if submission.cluster.runs:
        return "/dev/null"
    # A percent sign would begin one of Slurm's own patterns.
    return str(RunDir(submission.run_dir).batch_log).replace("%", "%%")


def _resources(cluster: ClusterConfig) -> dict[str, str]:
    """What each machine must have for its processes."""
    devices = cluster.devices_per_node
    if cluster.device == "cuda":
        if cluster.slurm.gpu_option == "gres":
            return {"gres": f"gpu:{devices}"}
        return {"gpus-per-node": str(devices)}
    threads = cluster.threads if cluster.threads != "auto" else 1
    return {"cpus-per-task": str(devices * threads)}


def _quoted(value: str) -> str:
    """A value for a line that starts with #SBATCH. Slurm reads a backslash as a shell does."""
    plain = value.replace("-", "").replace("_", "").replace(":", "").replace("/", "")
    if plain.isascii() and plain.replace(".", "").replace("@", "").isalnum():
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@dataclass(frozen=True, kw_only=True)
class _Container:
    """Commands that run a program in the container: on the first machine, and in a step."""

    here: str = ""
    step_options: str = ""
    in_step: str = ""


def _container(cluster: ClusterConfig, run_dir: Path) -> _Container:
    image = cluster.slurm.container
    if not image:
        return _Container()
    runs = shlex.quote(str(run_dir.parent))
    if image.endswith(".sif"):
        gpus = " --nv" if cluster.device == "cuda" else ""
        command = f"apptainer exec{gpus} --bind {runs} {shlex.quote(image)}"
        return _Container(here=command, in_step=command)
    # Pyxis gives options to srun: there the first machine needs a step of its own.
    mounts = shlex.quote(f"{run_dir.parent}:{run_dir.parent},/tmp:/tmp")
    options = f"--container-image={shlex.quote(image)} --container-mounts={mounts}"
    step = "srun --overlap --nodes=1 --ntasks=1"
    here = f'{step} --nodelist="$SLURMD_NODENAME" --kill-on-bad-exit=0 {options}'
    return _Container(here=here, step_options=options)


def _assignments(submission: Submission) -> list[str]:
    """Everything that depends on the job, quoted for the shell."""
    cluster = submission.cluster
    run = RunDir(submission.run_dir)
    container = _container(cluster, submission.run_dir)
    quoted = {
        "run": str(run.path),
        "token": str(run.ray_token),
        "stop_mark": str(run.stop_mark),
        "requeues": str(run.requeues),
        "log": str(run.batch_log),
        "machines_log": str(run.machines_log),
        "verb": submission.verb,
        "grace": str(cluster.grace),
        "devices": str(cluster.devices_per_node),
        "requeue_limit": str(REQUEUES),
    }
    # What grows when a run makes progress: results of stages and checkpoints.
    any_run = RunDir(Path())
    grows = [any_run.weights("*"), any_run.dataset("*"), any_run.checkpoints("*") / "*"]
    end = f"END_OF_JOB_{digest(submission.job_text.encode())}"
    python = ["python"] if cluster.slurm.container else [sys.executable]
    return [
        "",
        f"# The run {_one_line(submission.name)!r}.",
        *[f"{name}={shlex.quote(value)}" for name, value in quoted.items()],
        f"progress=({' '.join(map(str, grows))})",
        f"options=({shlex.join(submission.options)})",
        f"here=({container.here})",
        f"step_options=({container.step_options})",
        f"in_step=({container.in_step})",
        f"pipeline=({shlex.join([*python, '-m', 'pipeline'])})",
        *([] if cluster.slurm.container else [f"code={shlex.quote(str(_PACKAGE))}"]),
        "set_up() {",
        "    :",
        *[f"    {{\n    {line}\n    }} || return" for line in cluster.slurm.setup],
        *([] if cluster.slurm.container else ['    export PYTHONPATH="$code"']),
        "}",
        "write_job() {",
        f"cat <<'{end}'",
        submission.job_text.rstrip("\n"),
        end,
        "}",
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())


_BODY = r"""
work=/tmp/revcol-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token" PYTHONUNBUFFERED=1
driver= head= others=

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
    [[ ! -e $stop_mark ]] || return 1
    # COMPLETING: Slurm ends the job itself. It requeues a preempted one, and must not be made to
    # requeue one that the user has cancelled.
    [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]] || return 1
    local count=0 before= now
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
fi
clean_up
if ((driver_status == 75)) && may_requeue; then
    trap - TERM USR1
    scontrol requeue "$SLURM_JOB_ID"  # ends this script
fi
exit "$driver_status"
"""
