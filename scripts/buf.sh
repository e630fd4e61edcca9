#!/usr/bin/env bash
# Run buf on proto/ (buf.sh lint). npm ships it; without npm, or where npm cannot fetch it, this is skipped with a notice.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x node_modules/.bin/buf ]; then
    if ! command -v npm >/dev/null; then
        echo "buf: skipped, there is no npm here (any Node.js brings it)" >&2
        exit 0
    fi
    npm install --no-package-lock --no-audit --no-fund --loglevel=error >/dev/null || {
        echo "buf: skipped, npm could not install it" >&2
        exit 0
    }
fi
exec node_modules/.bin/buf "$@"
