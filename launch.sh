#!/usr/bin/env bash
# Creates the environment once, then runs `python -m pipeline` in it.
#   ./launch.sh jobs/quickstart.yaml
#
# requirements/ has one lock file per set of packages. .venv holds `run` and the sets added to it:
#   run     everything that a job needs
#   dev     checks and tests                  ./launch.sh test
#   bench   baselines of the benchmarks       ./launch.sh bench loader
#   s3      s3:// URLs                        ./launch.sh install s3
#   ray     Ray clusters                      ./launch.sh install ray
#   heif    HEIC images, as phones take them  ./launch.sh install heif
#   onnx    the export format onnx            ./launch.sh install onnx
#   hub     the export format hub             ./launch.sh install hub
#   kubernetes  runs on Kubernetes            ./launch.sh install kubernetes
# An active environment that has the packages of these files is used as it is.
# PYTHON=/path/to/python3.12 ./launch.sh ... selects the interpreter that .venv is created with.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv="$here/.venv"
locks="$here/requirements"
if [[ $here == *:* ]]; then
    echo "launch.sh: the path of the checkout has a colon, which separates paths: $here" >&2
    echo "  -> move it" >&2
    exit 2
fi
export DS_BUILD_OPS=0 PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
export PIPELINE_COMMAND="$0"  # usage texts and remedies name the command as it was typed

# Until exec, a stop request ends this script and the installation with the pipeline's exit code.
# A shell waits for a command in the foreground before it looks at a signal, so pip runs beside it.
trap 'kill $(jobs -p) 2>/dev/null; exit 75' TERM HUP USR1
trap 'kill $(jobs -p) 2>/dev/null; exit 130' INT

sets=(run)
case "${1:-}" in
    test) sets+=(dev) ;;
    bench) sets+=(bench) ;;
    install) sets+=("${@:2}") ;;
esac
for set in "${sets[@]}"; do
    [[ -f $locks/$set.txt ]] || {
        known=$(cd "$locks" && echo *.txt)
        echo "launch.sh: unknown set of packages '$set'; choose from: $known" >&2
        exit 2
    }
done

# Does python $1 have every pinned version of sets $2 ...? Ignores local versions (2.13.0+cpu).
has_packages() {
    local python=$1
    shift
    "$python" - "${@/#/$locks/}" <<'PY' 2>/dev/null
import importlib.metadata as metadata, re, sys
text = "".join(open(path + ".txt").read() for path in sys.argv[1:])
pins = re.findall(r"^([\w.-]+)==([^\s#;]+)", text, re.M)
wrong = [name for name, version in pins if metadata.version(name).split("+")[0] != version]
sys.exit(1 if wrong or sys.version_info < (3, 11) else 0)
PY
}

# Digest of the pins of set $1. Comments and blank lines do not count.
digest() { grep -o '^[^ #]*' "$locks/$1.txt" | cksum; }

# Is set $1 in .venv, with today's pins? An interrupted installation has no stamp.
is_installed() {
    local stamp="$venv/.installed-$1"
    [[ -f $stamp && $(<"$stamp") == "$(digest "$1")" ]] && "$venv/bin/python" -c '' 2>/dev/null
}

all_installed() {
    local set
    for set in "${sets[@]}"; do is_installed "$set" || return 1; done
}

# Starts .venv from scratch when the pins of `run` have changed; else adds to it.
install() {
    local base=${PYTHON:-python3} set files=()
    if ! is_installed run; then
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
            echo "launch.sh: $base is missing or older than 3.11: set PYTHON=/path/to/python3.11" >&2
            exit 2
        }
        rm -rf "$venv"
        "$base" -m venv "$venv"
    fi
    echo "launch.sh: installing ${sets[*]} into .venv (once, a few minutes)" >&2
    for set in "${sets[@]}"; do files+=(-r "$locks/$set.txt"); done
    # PIP_USER and the like would install beside the environment.
    PIP_USER=0 env -u PIP_TARGET -u PIP_PREFIX \
        "$venv/bin/python" -m pip install -q --disable-pip-version-check "${files[@]}" &
    wait $!
    for set in "${sets[@]}"; do digest "$set" >"$venv/.installed-$set"; done
}

active=
[[ -n ${VIRTUAL_ENV:-} && ${VIRTUAL_ENV:-} != "$venv" ]] && active="$VIRTUAL_ENV/bin/python"
if [[ $active ]] && has_packages "$active" "${sets[@]}"; then
    python="$active"
elif [[ ${1:-} == install && $active ]] && has_packages "$active" run; then
    # Jobs use the active environment, so packages in .venv would not help them.
    echo "launch.sh: the active environment is used as it is. Install into it yourself:" >&2
    echo "  pip install$(printf ' -r requirements/%s.txt' "${@:2}")" >&2
    exit 2
else
    python="$venv/bin/python"
    if ! all_installed; then
        exec 9<"$locks/run.txt"
        flock 9  # a second launch at the same time waits here, then finds the work done
        all_installed || install
        exec 9<&-
    fi
fi
[[ ${1:-} == install ]] && exit 0
exec "$python" -P -m pipeline "$@"
