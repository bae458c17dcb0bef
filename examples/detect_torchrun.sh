#!/usr/bin/env bash
# Objects in a folder with every GPU of a machine, or in PROCESSES processes; one set of results, as from one process.
# Called again after it was stopped, it goes on where it was.
#
#   examples/detect_torchrun.sh FOLDER OUT [options of ddetr detect ...]
set -euo pipefail

folder=${1:?usage: $0 FOLDER OUT [options of ddetr detect ...]}
out=${2:?usage: $0 FOLDER OUT [options of ddetr detect ...]}
shift 2

exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" --no-python \
    ddetr detect "$folder" --output "$out" --resume "$@"
