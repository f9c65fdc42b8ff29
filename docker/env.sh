# Names and places of docker/*.sh, to be edited or set in the environment; read by the other scripts, not run.
#   TARGET=cpu sh docker/build.sh        cuda (default) | cpu | hpu
# shellcheck shell=sh disable=SC2034
TARGET=${TARGET:-cuda}
IMAGE=${IMAGE:-yolo-v3:$TARGET}
CONTAINER=${CONTAINER:-yolo-v3}
# Base images. Pin what you have tried: NAME:TAG@sha256:DIGEST, from `docker buildx imagetools inspect NAME:TAG`.
CUDA_BASE=${CUDA_BASE:-pytorch/pytorch:2.14.1-cuda13.0-cudnn9-runtime}
CPU_BASE=${CPU_BASE:-python:3.12-slim}
HPU_BASE=${HPU_BASE:-vault.habana.ai/gaudi-docker/1.24.1/ubuntu24.04/habanalabs/pytorch-installer-2.11.0:latest}
# Folders of this machine: datasets, runs, weights.
DATA=${DATA:-$ROOT/data}
LOGS=${LOGS:-$ROOT/logs}
WEIGHTS=${WEIGHTS:-$ROOT/models/weights}
SHM_SIZE=${SHM_SIZE:-16g}              # loader workers pass images through shared memory; Docker's default is 64 MB
STOP_SECONDS=${STOP_SECONDS:-120}      # from SIGTERM to SIGKILL: a step and a checkpoint; Docker's default is 10
GPUS=${GPUS:-all}                      # cuda: all | device=0 | '"device=0,1"'
MLFLOW_PORT=${MLFLOW_PORT:-5000}
TENSORBOARD_PORT=${TENSORBOARD_PORT:-6006}
# Who owns the files that a container writes: the user who starts it.
USER_ID=${USER_ID:-$(id -u)}
GROUP_ID=${GROUP_ID:-$(id -g)}
