#!/bin/bash
#SBATCH --job-name=yolo-v3
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm_%j.out
# One task per GPU, without a launcher in between. Submit from the repository's directory, whose disk all nodes see:
#   sbatch clusters/slurm.sh [words of yolo-v3/main.py]
#   RUN=logs/big sbatch clusters/slurm.sh --config recipes/darknet_416.yaml data.root=/data/coco train.batch_size=4
# RUN is the run directory (default: logs/slurm_<job id>, which a requeued job keeps). Preemption (SIGTERM) and the end
# of the time (SIGUSR1, 300 s before) save and stop with exit code 143; this then puts the job back into the queue.
set -uo pipefail

RUN=${RUN:-logs/slurm_$SLURM_JOB_ID}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 40000))
export RUN MASTER_ADDR MASTER_PORT

# `exec`: the signal of Slurm reaches Python itself.
# shellcheck disable=SC2016  # the variables are those of each task
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec python3 yolo-v3/main.py --output "$RUN" --resume auto "$@"
' task "$@"
code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
