#!/bin/sh
# Run a command, by default a shell, in the container that docker/run.sh or compose started.
#   sh docker/exec.sh [command]
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/docker/env.sh"

[ $# -gt 0 ] || set -- bash
if [ -t 0 ] && [ -t 1 ]; then
    exec docker exec --interactive --tty "$CONTAINER" "$@"
fi
exec docker exec "$CONTAINER" "$@"
