#!/usr/bin/env bash
# Finds or makes the environment, then hands on to `python -m pipeline`:   ./launch.sh jobs/quickstart.yaml
# An active environment that has the pins is used as it is; PYTHON=/path/to/python3.11 names the one to build .venv with.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
pins="$here/requirements.txt"
export DS_BUILD_OPS=0 PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

has_pins() {  # does the environment of python $1 have every pinned distribution? (markers, extras and local versions aside)
    "$1" - "$pins" <<'PY' 2>/dev/null
import importlib.metadata as metadata, re, sys
pins = re.findall(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==([^\s#;]+)", open(sys.argv[1]).read(), re.M)
wrong = [name for name, version in pins if metadata.version(name).split("+")[0] != version]
sys.exit(1 if wrong or sys.version_info < (3, 11) else 0)
PY
}

install() {  # a fresh .venv; the stamp is written last, so an install that was cut short is done again
    local base=${PYTHON:-python3}
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "launch.sh: $base is older than Python 3.11 (or missing): set PYTHON=/path/to/python3.11" >&2
        exit 2
    }
    echo "launch.sh: installing the pinned dependencies into .venv (once, a few minutes)" >&2
    rm -rf "$here/.venv"
    "$base" -m venv "$here/.venv"
    "$here/.venv/bin/python" -m pip install -q --disable-pip-version-check -r "$pins"
    printf '%s\n' "$digest" >"$here/.venv/.pins"
}

if [[ -n ${VIRTUAL_ENV:-} && ${VIRTUAL_ENV:-} != "$here/.venv" ]] && has_pins "$VIRTUAL_ENV/bin/python"; then
    exec "$VIRTUAL_ENV/bin/python" -P -m pipeline "$@"
fi
python="$here/.venv/bin/python"
digest=$(grep -o '^[^ #]*' "$pins" | cksum)
current() { [[ -f $here/.venv/.pins && $(<"$here/.venv/.pins") == "$digest" ]] && "$python" -c '' 2>/dev/null; }
if ! current; then
    exec 9<"$pins" && flock 9  # the second of two starts at once waits here, then finds the work done
    current || install
    exec 9<&-
fi
exec "$python" -P -m pipeline "$@"
