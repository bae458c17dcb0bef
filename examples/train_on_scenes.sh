#!/usr/bin/env bash
# The whole way on made-up data: write scenes, train on them, score the result on scenes it has not seen.
#
#   examples/train_on_scenes.sh WORK [options of ddetr train ...]
#
# WORK receives scenes/, run/ and scores/. TRAIN and VAL (default 2000 and 200) are the numbers of scenes. A first run
# that only shows that everything works takes minutes: TRAIN=200 examples/train_on_scenes.sh work --epochs 3
set -euo pipefail

work=${1:?usage: $0 WORK [options of ddetr train ...]}
shift
here=$(dirname "$0")

# Two seeds, so that no scene is in both.
python3 "$here/make_scenes.py" "$work/scenes" --count "${TRAIN:-2000}" --seed 1 --split train
python3 "$here/make_scenes.py" "$work/scenes" --count "${VAL:-200}" --seed 2 --split val

ddetr train "$work/scenes" --preset tiny --output "$work/run" "$@"
ddetr eval "$work/scenes" --model "$work/run" --per-class --output "$work/scores"
