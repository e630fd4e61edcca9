#!/usr/bin/env bash
# Fail when the committed stubs are not what proto/ generates.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
scripts/proto.sh "$scratch/gen" 2>/dev/null
diff -r --exclude=__pycache__ tailrace/rpc/gen "$scratch/gen" || {
    echo "proto: the stubs in tailrace/rpc/gen are out of date; run make proto" >&2
    exit 1
}
