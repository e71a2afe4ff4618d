#!/bin/bash
# Measures what rules do to a web server in a guest with one processor, beside two
# batch jobs and idle processes: alone, without rules, with rules, and after undo.
#   GO=go testdata/bench/rules/run.sh [build]    build makes bin/rules and ends
# Needs bin/gondola and bin/gondola-full (make build) and a usable /dev/kvm.
set -eu
cd "$(dirname "$0")/../../.."
[ "${1:-}" != build ] || { CGO_ENABLED=0 ${GO:-go} build -o bin/rules ./testdata/bench/rules; exit; }
seconds=${SECONDS_EACH:-10}
g=bin/gondola
export XDG_STATE_HOME=$(mktemp -d)
$g run -d --name web --cpus 1 --memory 256M -p 127.0.0.1:8080:80 --userland busybox --copy bin/rules:/bin/rules >/dev/null
trap '$g stop --kill web >/dev/null' EXIT
$g exec web -- sh -c 'setsid rules serve :80 </dev/null >/dev/null 2>&1 & for i in $(seq 20); do setsid sleep 10000 </dev/null >/dev/null 2>&1 & done'
sleep 2
load() { echo -n "$1: "; bin/rules load http://127.0.0.1:8080/ 2 "$seconds"; }
load 'warm-up'
load 'alone'
$g exec web -- sh -c 'for i in 1 2; do setsid rules hog </dev/null >/dev/null 2>&1 & done'
load 'beside two hogs, no rules'
$g rules apply --every 1s --machine web & rules=$!
bin/rules load http://127.0.0.1:8080/ 2 8 >/dev/null # some cycles
load 'beside two hogs, rules'
$g rules show web | grep -v sleep
kill -INT $rules; wait $rules || true
load 'beside two hogs, after the rules ended'
$g rules show web | grep -v sleep
$g rules history -n 8 web
echo "cost of a cycle in the guest by number of processes:"
for n in 0 80 900; do
	[ $n = 0 ] || $g exec web -- sh -c "for i in \$(seq $n); do setsid sleep 10000 </dev/null >/dev/null 2>&1 & done"
	$g rules apply --every 1s --machine web --no-orders >/dev/null & rules=$!
	sleep "${COST_SECONDS:-8}"
	kill -INT $rules; wait $rules || true
	$g db query "SELECT max(processes) AS processes, count(*) AS cycles, max(guest_us) AS first_us, min(guest_us) AS least_us, cast(avg(guest_us) AS INTEGER) AS mean_us, max(took_ms) AS longest_ms FROM cycles WHERE time_ms > (unixepoch() - ${COST_SECONDS:-8}) * 1000"
done
