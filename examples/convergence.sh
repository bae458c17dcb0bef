#!/usr/bin/env bash
# The paper's claim at a small size: Deformable DETR against DETR, equally large, on the same made-up pictures.
#
#   examples/convergence.sh WORK [options of ddetr train ...]
#
# Both start from random weights, on the same trunk, data, order, augmentation and schedule, and see every picture as
# often; WORK/convergence.png shows AP and AP of small objects against epochs. A run that was stopped goes on when this
# is started again with the same WORK. TRAIN and VAL (default 600 and 100) are the numbers of scenes, MODELS the presets.
# The defaults take about half an hour on one quiet core with AMX. Needs pip install 'ddetr-cli[plots]'.
set -euo pipefail

work=${1:?usage: $0 WORK [options of ddetr train ...]}
shift
here=$(dirname "$0")
models=${MODELS:-tiny-plain detr-tiny}

# Two seeds, so that no scene is in both.
python3 "$here/make_scenes.py" "$work/scenes" --count "${TRAIN:-600}" --seed 1 --split train
python3 "$here/make_scenes.py" "$work/scenes" --count "${VAL:-100}" --seed 2 --split val

runs=()
for model in $models; do
    run=$work/$model
    runs+=("$run")
    if [ -e "$run/config.json" ]; then
        ddetr train --resume "$run"
    else
        ddetr train "$work/scenes" --preset "$model" --image-size 128 --batch-size 4 --precision bf16 --epochs 15 \
            --output "$run" "$@"
    fi
done
python3 "$here/convergence.py" "${runs[@]}" --output "$work/convergence.png"
