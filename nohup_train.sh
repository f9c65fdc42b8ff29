#!/usr/bin/env bash
# Train in the background, with a log and a PID file, and watch the log until the run ends.
#   ./nohup_train.sh --gpu 0 data.root=FOLDER      any arguments of yolo-v3/main.py
# Ctrl-C ends the watching only; the training survives it, and logout. Stop it with: kill PID (it saves last.pt first).
# The exit code is that of the training. PYTHON=... chooses the interpreter, else .venv/bin/python or python3.
# LOG_DIRECTORY=... is where log and PID file go, else logs/ of the repository. Needs bash and GNU tail.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
fi
directory=${LOG_DIRECTORY:-$root/logs}
mkdir -p "$directory"
# The PID makes the name unique: two starts in one second keep their own logs.
name=$directory/nohup_$(date +%y%m%d-%H%M%S)_$$

# With job control the training has a process group of its own, so that Ctrl-C of this terminal does not reach it, and
# SIGINT is not ignored in it, as it would be in a background job without.
set -m
: > "$name.out" # tail may look for it before the training has started
nohup "$python" "$root/yolo-v3/main.py" "$@" >> "$name.out" 2>&1 < /dev/null &
pid=$!
set +m
echo "$pid" > "$name.pid"
echo "training as PID $pid, log $name.out; stop it with: kill $pid; Ctrl-C ends this view only"

tail -n +1 -f --pid="$pid" "$name.out" &
watcher=$!
# A background job ignores SIGINT, so the watcher has to be ended.
trap 'kill "$watcher"; echo; echo "training goes on as PID $pid; watch it with: tail -f $name.out"; exit 0' INT HUP TERM
code=0
wait "$pid" || code=$?
wait "$watcher" || true
rm -f "$name.pid"
exit "$code"
