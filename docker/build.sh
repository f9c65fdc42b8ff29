#!/bin/sh
# Build the image:   sh docker/build.sh [options of docker build]      TARGET=cuda (default) | cpu | hpu, see docker/env.sh
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/docker/env.sh"

case $TARGET in
    cuda) BASE=$CUDA_BASE ;;
    cpu) BASE=$CPU_BASE ;;
    hpu) BASE=$HPU_BASE ;;
    *)
        echo "TARGET=$TARGET: must be cuda, cpu or hpu" >&2
        exit 2
        ;;
esac
exec docker build --file "$ROOT/docker/Dockerfile.$TARGET" --build-arg "BASE=$BASE" --tag "$IMAGE" "$@" "$ROOT"
