#!/usr/bin/env bash
# Train in several processes of one machine: one for each GPU, or PROCESSES of them on its CPU. Called again after it was
# stopped, it goes on where it was.
#
#   examples/train_torchrun.sh DATA RUN [options of ddetr train ...]
#
# --batch-size is that of all processes together. On several machines start the same command on each, with RUN on a disk
# that all of them see and, instead of --standalone, what torchrun needs to find the others:
#   --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500
set -euo pipefail

data=${1:?usage: $0 DATA RUN [options of ddetr train ...]}
run=${2:?usage: $0 DATA RUN [options of ddetr train ...]}
shift 2

start=("$data" --output "$run" "$@")
if compgen -G "$run/checkpoints/step-*.safetensors" > /dev/null; then
    start=(--resume "$run")
fi
# torchrun passes on the signals it knows of; SIGUSR1 is what batch systems send before the time is up.
exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --no-python ddetr train "${start[@]}"
