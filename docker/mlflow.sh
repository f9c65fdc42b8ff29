#!/bin/sh
# Show the runs that the logger mlflow recorded (docs/mlflow.md): http://localhost:5000, MLFLOW_PORT in docker/env.sh.
#   sh docker/mlflow.sh
# Reads mlflow.db and mlartifacts/ of the repository's folder, at the path that the records name.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/docker/env.sh"

exec docker run --rm --init --name "$CONTAINER-mlflow" --user "$USER_ID:$GROUP_ID" \
    --publish "127.0.0.1:$MLFLOW_PORT:5000" --volume "$ROOT:/workspace" "$IMAGE" \
    mlflow server --host 0.0.0.0 --port 5000 --backend-store-uri sqlite:////workspace/mlflow.db
