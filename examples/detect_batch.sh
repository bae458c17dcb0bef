#!/usr/bin/env bash
# Objects in a folder of any size, PARTS parts of it, JOBS at a time. Killed, it goes on where it was when called again:
#   examples/detect_batch.sh FOLDER OUT [options of ddetr detect ...]
set -euo pipefail
export folder=${1:?usage: $0 FOLDER OUT [options ...]} out=${2:?usage: $0 FOLDER OUT [options ...]} parts=${PARTS:-8}
shift 2
part() {
    code=0
    ddetr detect "$folder" --output "$out/part-$1" --shard "$1/$parts" --resume --quiet "${@:2}" || code=$?
    [[ $code =~ ^(0|3|4)$ ]] || exit "$code" # 3 and 4: pictures that cannot be read, which are in the results by name
}
export -f part
run=(xargs -P "${JOBS:-2}" -I{} bash -euc 'part "$@"' part {})
if command -v parallel > /dev/null; then run=(parallel --will-cite --halt soon,fail=1 -j "${JOBS:-2}" part {}); fi
seq "$parts" | "${run[@]}" "$@"
ddetr detect --merge $(seq -f "$out/part-%.0f" "$parts") --output "$out/all" --overwrite
