#!/usr/bin/env bash
# Makes .venv with everything that scripts and tests need, for a GPU or a CPU, and checks the machine.
#
# Run: bash setup_runpod.sh        (from any folder; again at any time: it does only what is missing)
#
# Scripts run from the checkout itself; nothing of this project is installed into .venv.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$root"
venv_python="$root/.venv/bin/python"
stamp="$root/.venv/.installed"

say() { printf 'setup: %s\n' "$*"; }
stop() { # stop CODE MESSAGE
    printf 'setup: %s\n' "$2" >&2
    exit "$1"
}

# ---------------------------------------------------------------- Python 3.11 or 3.12

is_supported() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3 python; do
        if command -v "$candidate" >/dev/null && is_supported "$candidate"; then
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null || "$candidate" -c 'import pip, venv' 2>/dev/null ||
                stop 2 "$candidate cannot make virtual environments; apt-get install -y $candidate-venv, then again"
            command -v "$candidate"
            return
        fi
    done
    stop 2 "no Python 3.11 or 3.12 here (python3 is $(python3 -V 2>&1 || true)); apt-get install -y python3.11 python3.11-venv, or pyenv install 3.11, then again"
}

# Colab's Python comes without ensurepip, but with pip, which then installs itself into the new environment.
make_environment() {
    if "$venv_python" -m pip --version >/dev/null 2>&1; then return; fi
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$root/.venv"
    else
        "$python" -m venv --without-pip "$root/.venv"
        "$python" -m pip --python "$venv_python" install --quiet --disable-pip-version-check pip
    fi
}

if [ -e "$root/.venv" ]; then
    if [ -x "$venv_python" ] && "$venv_python" -c '' 2>/dev/null; then
        is_supported "$venv_python" ||
            stop 2 "$root/.venv holds $("$venv_python" -V); Python 3.11 or 3.12 is needed: remove .venv, then again"
    else
        stop 2 "$root/.venv/bin/python does not run (moved, or its Python is gone); remove .venv, then again"
    fi
    python="$venv_python"
else
    python="$(find_python)"
fi

# ---------------------------------------------------------------- pod: what is large lives under /workspace

pod=no
if [ -n "${RUNPOD_POD_ID:-}" ] && [ -d /workspace ]; then
    pod=yes
    export HF_HOME="${HF_HOME:-/workspace/huggingface}"
    export TMPDIR=/workspace/.tmp PIP_NO_CACHE_DIR=1 # the container's own disk is small
    mkdir -p "$TMPDIR"
    case "$root/" in
    /workspace/*) ;;
    *) say "warning: $root is lost when the pod stops; clone under /workspace instead" ;;
    esac
fi

# ---------------------------------------------------------------- what is installed already?

kind=cpu requirements=requirements-cpu.txt
if [[ "$(nvidia-smi -L 2>/dev/null || true)" == GPU* ]]; then kind=gpu requirements=requirements.txt; fi
wanted="$kind $root $("$python" -V) $(cat requirements.txt requirements-cpu.txt | cksum)"

if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    # ------------------------------------------------------------ driver and disk, before anything is installed
    machine="$(KIND=$kind "$python" - <<'PYTHON'
import os
from cai_experiment.models.disk import checkpoints_gb
from cai_experiment.models.hardware import detect, driver_problem
from cai_experiment.models.memory import weights_gb
from cai_experiment.models.choice import resolve_model

if os.environ["KIND"] == "cpu":
    print(4, 0, 0)
else:
    preset = resolve_model(None, detect()).preset
    weights = 0 if preset.is_local else weights_gb(preset.architecture, "4bit")
    outputs = 1 + (0 if preset.is_local else checkpoints_gb(preset.architecture))
    print(round(20 + weights + outputs), round(weights), round(outputs), driver_problem())
PYTHON
    )"
    read -r needed weights outputs driver_problem <<<"$machine"
    [ -z "$driver_problem" ] || stop 1 "$driver_problem"
    free=$(($(df -Pk "$root" | awk 'NR == 2 { print $4 }') / 1000000))
    if [ "$kind" = gpu ]; then
        say "needs $needed GB of disk (20 for packages, $weights for 4-bit weights, $outputs for a milestone's checkpoints and data; vLLM's 16-bit weights of the 32B model take 66 more); $free GB free"
    else
        say "needs $needed GB of disk, or 10 where pip finds only the CUDA build of torch; $free GB free"
    fi
    [ "$free" -ge "$needed" ] || stop 1 "$free GB free at $root, $needed GB needed; make room or take a larger volume"

    # ------------------------------------------------------------ install
    make_environment
    say "installing $requirements into .venv ($("$venv_python" -V), $kind); about 4 minutes on a CPU, 10 on a pod"
    pip() { "$venv_python" -m pip --disable-pip-version-check "$@"; }
    [ "$kind" = gpu ] || pip install --quiet "$(grep -m1 '^torch==' requirements-cpu.txt)"
    pip install --quiet -r "$requirements"
    printf '%s' "$wanted" >"$stamp"
fi

if [ "$pod" = yes ] && ! grep -q '^export HF_HOME=' .venv/bin/activate; then
    printf '\nexport HF_HOME="%s"\n' "$HF_HOME" >>.venv/bin/activate
fi

"$venv_python" cai_experiment/scripts/doctor.py
