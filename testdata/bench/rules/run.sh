#!/bin/bash
# Measures what rules do to a web server in a guest with one processor, beside two
# batch jobs and an idle crowd of processes, and what a cycle costs the guest.
#   testdata/bench/rules/run.sh build   make bin/rules
#   testdata/bench/rules/run.sh load    request rate and latency: alone, without rules, with rules, after them
#     (ROUNDS, SECONDS_EACH, CROWD idle processes; cycles of CLIMB until the ladder is climbed, then of CYCLE)
#   testdata/bench/rules/run.sh cost    processor time of a cycle at 10, 100 and 1000 processes
# The batch jobs are loops of the shell: a program in Go wakes up a hundred times a second
# for its own sake, which in a guest of a PVM host is half of what the guest's kernel can do.
# Needs bin/gondola and bin/gondola-full (make build) and a usable /dev/kvm. The guest's
# one processor is to be what is contended, not the host's: on a host with several, the
# vCPU has one for itself and everything else another; on a host with one, everything else
# goes before the vCPU, in all phases. Phases come in rounds, so that a host that is slower
# at times is so for all of them.
set -eu
cd "$(dirname "$0")/../../.."
g=bin/gondola
export XDG_STATE_HOME=$(mktemp -d)

start() { # memory; the machine with the programs in it
	$g run -d --name web --cpus 1 --memory "$1" -p 127.0.0.1:8080:80 --userland busybox --copy bin/rules:/bin/rules >/dev/null
	trap '$g stop --kill web >/dev/null' EXIT
	local tid
	tid=$($g info --json web | tr -d ' \n' | sed 's/.*"threads":\[\([0-9]*\).*/\1/')
	if [ "$(nproc)" -gt 1 ]; then
		taskset -ap 1 "$($g info --json web | tr -d ' \n' | grep -o '"pid":[0-9]*' | head -1 | cut -d: -f2)" >/dev/null
		taskset -p 2 "$tid" >/dev/null
		taskset -p 1 $$ >/dev/null
	else
		renice -n 19 -p "$tid" >/dev/null
	fi
}
# Idle processes: forks of a shell, each of which waits for somebody to open a pipe. They
# start no program, which would cost a guest of a PVM host more than all else here.
crowd() { # how many more
	$g exec web -- busybox sh -c "mkfifo -m 600 /tmp/crowd 2>/dev/null; setsid busybox sh -c 'for i in \$(seq -s \" \" $1); do : </tmp/crowd & done
		echo >/tmp/crowded; exec sleep 100000' </dev/null >/dev/null 2>&1 &
		until [ -e /tmp/crowded ]; do sleep 1; done; rm /tmp/crowded"
}
load() { bin/rules load http://127.0.0.1:8080/ 2 "$2" "$XDG_STATE_HOME/phases" "$1"; }
said() { grep -c "$1" "$XDG_STATE_HOME/said" || true; }
rulesfile() { $g rules show --default | sed "s/^cycle: .*/cycle: $1/" >"$XDG_STATE_HOME/new.yaml"; mv "$XDG_STATE_HOME/new.yaml" "$XDG_STATE_HOME/rules.yaml"; }

case "${1:-}" in
build) CGO_ENABLED=0 ${GO:-go} build -o bin/rules ./testdata/bench/rules ;;
load)
	start 256M
	$g exec web -- sh -c 'setsid rules serve :80 </dev/null >/dev/null 2>&1 &
		for i in 1 2; do setsid sh -c "while :; do :; done" </dev/null >/dev/null 2>&1 & echo $! >>/tmp/hogs; done; kill -STOP $(cat /tmp/hogs)'
	until bin/rules load http://127.0.0.1:8080/ 1 2 "$XDG_STATE_HOME/ready" ready >/dev/null 2>&1; do sleep 1; done
	crowd "${CROWD:-50}"
	load 'warm-up' 5 && rm "$XDG_STATE_HOME/phases"
	seconds=${SECONDS_EACH:-8}
	for round in $(seq "${ROUNDS:-5}"); do
		load 'alone' "$seconds"
		$g exec web -- sh -c 'kill -CONT $(cat /tmp/hogs)'
		load 'beside two batch jobs, no rules' "$seconds"
		rulesfile "${CLIMB:-1s}"
		$g rules apply "$XDG_STATE_HOME/rules.yaml" --machine web --no-orders >"$XDG_STATE_HOME/said" & rules=$!
		for i in $(seq 20); do # until the ladder is climbed
			load 'while the rules climb' 5 || true # a look at a slow guest takes seconds of its processor
			[ "$(said '→ high')" -lt 1 ] || [ "$(said ' sh: .*→ low')" -lt 2 ] || break
		done
		echo "round $round: after $i times 5 s: $(said '→ high') raised to high, $(said ' sh: .*→ low') of the batch jobs low"
		rulesfile "${CYCLE:-10s}"
		load 'while the rules climb' 5 || true
		load 'beside two batch jobs, rules' "$seconds"
		kill -INT $rules; wait $rules || true
		$g exec web -- sh -c 'kill -STOP $(cat /tmp/hogs)'
	done
	$g rules history -n 8 web
	bin/rules sum "$XDG_STATE_HOME/phases"
	;;
cost)
	start 512M
	had=$($g exec web -- sh -c 'ls -d /proc/[0-9]* | wc -l')
	echo "the guest has $had processes of its own, the kernel's among them"
	began=0
	for n in 10 100 1000; do
		crowd $((n - began))
		began=$n
		from=$(date +%s%3N)
		$g rules apply --every 1s --machine web --no-orders >/dev/null & rules=$!
		for i in $(seq 60); do # until there are ten cycles with all of them
			sleep 5
			seen=$($g db query --json "SELECT count(*) AS n FROM cycles WHERE time_ms > $from AND processes > $n" 2>/dev/null | tr -dc 0-9)
			[ "${seen:-0}" -lt 11 ] || break
		done
		kill -INT $rules; wait $rules || true
		$g db query "SELECT $n AS crowd, max(processes) AS processes, count(*) AS cycles, max(guest_us) AS first_us, min(guest_us) AS least_us,
			cast(avg(guest_us) FILTER (WHERE changes < processes / 2) AS INTEGER) AS mean_us, max(took_ms) AS longest_ms FROM cycles WHERE time_ms > $from"
	done
	;;
*) echo "usage: $0 build | load | cost" >&2; exit 2 ;;
esac
