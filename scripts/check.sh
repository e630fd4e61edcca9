#!/usr/bin/env bash
# Everything that is checked without running the product. All checks run; the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" BUF_CACHE_DIR="${BUF_CACHE_DIR:-$PWD/node_modules/.cache/buf}"
failed=()

check() {
    local name=$1
    shift
    printf '%-22s ' "$name"
    local output status=0
    output=$("$@" 2>&1) || status=$?
    if [ "$status" = 0 ]; then
        case "$output" in *": skipped,"*) echo "skipped: ${output##*skipped, }" ;; *) echo ok ;; esac
    else
        printf 'FAILED\n%s\n' "$output"
        failed+=("$name")
    fi
}

check "ruff" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy --no-error-summary
check "import rules" lint-imports --no-cache
check "repository rules" python scripts/hooks.py
check "stubs are current" scripts/proto_drift.sh
check "structure is current" python scripts/structure.py --check
check "buf lint" scripts/buf.sh lint

if [ ${#failed[@]} -gt 0 ]; then
    echo "check: failed: ${failed[*]}" >&2
    exit 1
fi
