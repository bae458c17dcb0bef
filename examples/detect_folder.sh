#!/usr/bin/env bash
# Find objects in every picture of a folder, then say what there is how often.
#
#   examples/detect_folder.sh FOLDER [OUT]
#
# MODEL (default demo) and THRESHOLD (default 0.5) come from the environment.
set -euo pipefail

folder=${1:?usage: $0 FOLDER [OUT]}
out=${2:-ddetr-out}
threshold=${THRESHOLD:-0.5}

status=0
ddetr detect "$folder" --model "${MODEL:-demo}" --threshold "$threshold" --output "$out" --overwrite || status=$?
case $status in
    0) ;;
    3) echo "some pictures could not be read; they are named above and marked in $out/images.json" >&2 ;;
    *) exit "$status" ;;
esac
python3 "$(dirname "$0")/count_objects.py" "$out" --threshold "$threshold"
