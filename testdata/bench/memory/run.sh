#!/bin/bash
# The classic experiment with a memory manager: four machines with equal shares, of which
# two are idle and two use what they have, first without a tax on idle memory, then
# with one of 75 %. Who has how much, over time, becomes a picture and a table.
#   testdata/bench/memory/run.sh [SECONDS] [PICTURE]    SECONDS of each part (default 90; 240 on a PVM host is better)
# Needs gcc, bin/gondola (make build) and a usable /dev/kvm.
set -euo pipefail
cd "$(dirname "$0")/../../.."
g=$PWD/bin/gondola
seconds=${1:-90} picture=${2:-bin/memory-four.svg}
dir=$(mktemp -d)
export XDG_RUNTIME_DIR=$dir XDG_STATE_HOME=$dir GONDOLA_STATES=$dir/states
trap 'for m in idle-1 idle-2 busy-1 busy-2; do "$g" stop --kill $m >/dev/null 2>&1 || true; done; rm -rf "$dir"' EXIT
gcc -O2 -static -o bin/memory testdata/bench/memory/memory.c
for m in idle-1 idle-2 busy-1 busy-2; do
	"$g" run -d --name $m --memory 128M --memory-min 40M --memory-max 128M --shares 1000 --userland busybox --copy bin/memory:/bin/memory >/dev/null
done
echo "four machines run; they use their memory" >&2
pids=()
for m in idle-1 idle-2; do "$g" exec $m -- memory once 72 & pids+=($!); done
for m in busy-1 busy-2; do "$g" exec $m -- sh -c 'setsid memory keep 36 </dev/null >/dev/null 2>&1 &' & pids+=($!); done
wait "${pids[@]}"
for tax in 0 0.75; do
	echo "a budget of 288 MiB, tax $tax, $seconds s" >&2
	timeout -s INT "$seconds" "$g" manager --budget 288M --tax $tax --record "$dir/run" >"$dir/said" 2>&1 || [ $? = 124 ] || { cat "$dir/said" >&2; exit 1; }
	echo "tax $tax, at the end:"
	"$g" ps | cut -c1-100
done
mkdir -p "$(dirname "$picture")"
"$g" manager plot "$dir/run" --title "Four machines, equal shares, two idle: tax 0 %, then 75 %" -o "$picture"
cp "$dir/run" bin/memory-four.jsonl
echo "$picture"
