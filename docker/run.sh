#!/bin/sh
# Run a command in a new container, by default a shell:
#   sh docker/run.sh
#   sh docker/run.sh python3 yolo-v3/main.py --config recipes/quickstart.yaml
#   DETACH=1 sh docker/run.sh python3 yolo-v3/main.py data.root=data/coco --output logs/big --resume auto
# DETACH=1: in the background; then  docker logs -f yolo-v3  shows it and  docker stop yolo-v3  saves and stops it.
# The repository is mounted, so that edits count at once; results belong to you. Settings: docker/env.sh.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/docker/env.sh"

set -- "$IMAGE" "$@" # options are put in front of it
case $TARGET in
    cuda) set -- --gpus "$GPUS" "$@" ;;
    hpu)
        set -- --runtime=habana --env "HABANA_VISIBLE_DEVICES=${HABANA_VISIBLE_DEVICES:-all}" \
            --env OMPI_MCA_btl_vader_single_copy_mechanism=none --cap-add=sys_nice --net=host "$@"
        ;;
esac
for name in MLFLOW_TRACKING_URI MLFLOW_EXPERIMENT_NAME; do
    if [ -n "$(printenv "$name" || true)" ]; then
        set -- --env "$name" "$@" # its value is that of this shell
    fi
done
if [ -n "${DETACH:-}" ]; then
    set -- --detach "$@" # kept when it ends, for `docker logs`; remove it with: docker rm NAME
elif [ -t 0 ] && [ -t 1 ]; then
    set -- --rm --interactive --tty "$@"
else
    set -- --rm "$@"
fi
mkdir -p "$DATA" "$LOGS" "$WEIGHTS" # as you; Docker would make them as root
exec docker run --name "$CONTAINER" --init --user "$USER_ID:$GROUP_ID" \
    --shm-size "$SHM_SIZE" --stop-timeout "$STOP_SECONDS" \
    --volume "$ROOT:/workspace" --volume "$DATA:/workspace/data" --volume "$LOGS:/workspace/logs" \
    --volume "$WEIGHTS:/workspace/models/weights" "$@"
