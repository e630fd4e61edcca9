#!/usr/bin/env bash
# Generate the gRPC stubs of proto/tailrace/v1 into a folder (default: tailrace/rpc/gen).
#
# protoc names Python modules after the .proto path, tailrace/v1/, which would collide with the package `tailrace`
# itself. So the modules are generated in a scratch folder, moved, and their imports of one another renamed.
# The names inside the descriptors (tailrace.v1.*) do not change.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-tailrace/rpc/gen}
python=${PYTHON:-.venv/bin/python}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc -Iproto \
    --python_out="$scratch" --grpc_python_out="$scratch" \
    --mypy_out="$scratch" --mypy_grpc_out="$scratch" \
    proto/tailrace/v1/*.proto
sed -i -E \
    -e 's/^from tailrace\.v1 import/from tailrace.rpc.gen import/' \
    -e 's/\btailrace\.v1\.([a-z_]+_pb2)\b/tailrace.rpc.gen.\1/g' \
    -e 's/^import tailrace\.v1\b/import tailrace.rpc.gen/' \
    "$scratch"/tailrace/v1/*
mkdir -p "$out"
rm -f "$out"/*_pb2*.py "$out"/*_pb2*.pyi
cp "$scratch"/tailrace/v1/*_pb2* "$out"/
printf '"""Generated from proto/ by scripts/proto.sh; do not edit."""\n' >"$out/__init__.py"
