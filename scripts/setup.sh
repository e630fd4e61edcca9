#!/usr/bin/env bash
# Make .venv complete: PyTorch of the right kind first, then everything that pyproject.toml names.
#
# On Linux the plain requirement `torch` brings several GB of CUDA libraries. A machine without an NVIDIA GPU gets the
# CPU build instead. TORCH=cpu or TORCH=cuda decides it by hand.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
requirement=$(sed -n 's/^ *"\(torch==[^"]*\)",$/\1/p' pyproject.toml)
cpu_index=https://download.pytorch.org/whl/cpu

make_venv() {
    [ -x "$python" ] && return
    local base=${PYTHON:-python3}
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "setup: Python 3.11 or later is needed; name one with PYTHON=/path/to/python3" >&2
        exit 1
    }
    "$base" -m venv .venv
}

installed_torch() {
    "$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true
}

# The version that a plain `pip install` would take from wherever this machine's pip looks; nothing is downloaded.
resolved_torch() {
    "$python" -m pip install --quiet --dry-run --ignore-installed --no-deps --report - "$requirement" 2>/dev/null |
        "$python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' 2>/dev/null || true
}

install_cpu_torch() {
    if [[ $(resolved_torch) == *+cpu ]]; then
        "$python" -m pip install --quiet "$requirement"
    elif ! "$python" -m pip install --quiet --index-url "$cpu_index" "$requirement"; then
        cat >&2 <<NOTICE
********************************************************************************
setup: PyTorch's CPU index ($cpu_index) did not answer.
Installing the plain build, which on Linux brings several GB of CUDA libraries.
It runs on a CPU too. To avoid it, put a CPU wheel where pip finds it
(pip config set global.find-links DIR), and run \`make setup TORCH=cpu\` again.
********************************************************************************
NOTICE
        "$python" -m pip install --quiet "$requirement"
    fi
}

# An installed build of the right version stays, unless TORCH asks for the other kind.
is_wanted_torch() {
    local have=$1 want=$2 kind=cuda
    if [[ $have == *+cpu ]]; then kind=cpu; fi
    [[ ${have%%+*} == "${requirement#torch==}" ]] && [[ -z ${TORCH:-} || $kind == "$want" || $(uname -s) != Linux ]]
}

install_torch() {
    local want=${TORCH:-} have
    have=$(installed_torch)
    if [ -z "$want" ]; then
        want=cpu
        if nvidia-smi -L >/dev/null 2>&1; then want=cuda; fi
    fi
    case "$want" in cpu | cuda) ;; *) echo "setup: TORCH must be cpu or cuda, got $want" >&2 && exit 2 ;; esac
    if is_wanted_torch "$have" "$want"; then return; fi
    echo "setup: installing $requirement for $want"
    if [[ $want == cpu && $(uname -s) == Linux ]]; then
        install_cpu_torch
    else
        "$python" -m pip install --quiet "$requirement"
    fi
}

export PIP_DISABLE_PIP_VERSION_CHECK=1
make_venv
install_torch
echo "setup: installing tailrace and what it needs (a few minutes the first time)"
PYTHONWARNINGS=ignore "$python" -m pip install --quiet --editable '.[all,dev]'
