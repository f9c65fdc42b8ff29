#!/usr/bin/env bash
# torchrun that restarts after a crash, and says with its exit code whether to run it again:
#   clusters/torchrun.sh RUN [options of torchrun] -- [words of yolo-v3/main.py]
#   clusters/torchrun.sh logs/big --nproc_per_node=8 -- --config recipes/darknet_416.yaml data.root=/data/coco
# RUN is the run directory, started or continued (--resume auto). A process that crashes makes torchrun start all of
# them again, RESTARTS times (default 3). SIGTERM, SIGINT and SIGUSR1 save and stop. torchrun itself would exit with 1
# whatever happened, and die of SIGUSR1; this exits with 143 where the run was stopped and saved, else as torchrun does.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
run=${1:?usage: clusters/torchrun.sh RUN [options of torchrun] -- [words of yolo-v3/main.py]}
shift
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
[ $# -eq 0 ] || shift

# Not `torchrun`, which may belong to another Python than the one that has the packages.
python3 -m torch.distributed.run --max-restarts="${RESTARTS:-3}" "${options[@]}" \
    "$root/yolo-v3/main.py" --output "$run" --resume auto "$@" &
pid=$!
trap 'kill -TERM "$pid" 2> /dev/null || true' TERM INT USR1
code=0
wait "$pid" || code=$?
while kill -0 "$pid" 2> /dev/null; do # a signal ends the waiting, not torchrun
    code=0
    wait "$pid" || code=$?
done
if [ "$code" -ne 0 ] && grep -q '"status": "stopped"' "$run/status.json" 2> /dev/null; then
    code=143
fi
exit "$code"
