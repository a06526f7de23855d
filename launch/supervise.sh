#!/usr/bin/env bash
# Runs a command, and again after a crash, a bounded number of times: supervise.sh COUNT_FILE RESTARTS PAUSE COMMAND...
#
# Before it, PAUSE seconds pass, then twice as many, and so on. COUNT_FILE holds how often the command was started, so that the bound holds across reboots; it goes when the command
# ends well. Not started again is what ended well (exit code 0), what was given wrong input (2), and what was asked to
# leave: SIGTERM and SIGINT are handed on to the command, once, and it is waited for.
set -euo pipefail

count_file=$1 restarts=$2 first_pause=$3
shift 3
child="" asked=no

leave() {
    asked=yes
    if [[ $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap leave TERM INT

now() { date '+%Y-%m-%d %H:%M:%S'; }

# The command's exit code. A trap ends `wait` early, so it is asked until the child is gone.
wait_for_child() {
    local code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    return "$code"
}

while true; do
    started=0
    if [[ -s $count_file ]]; then started=$(<"$count_file"); fi
    if ((started > restarts)); then
        echo "== $(now) started $started times, and $restarts restarts are allowed: not started again"
        exit 1
    fi
    echo $((started + 1)) >"$count_file"
    echo "== $(now) $*"
    "$@" &
    child=$!
    code=0
    wait_for_child || code=$?
    child=""
    echo "== $(now) exit code $code"
    if ((code == 0)); then rm -f "$count_file"; fi
    if ((code == 0 || code == 2)) || [[ $asked == yes ]]; then exit "$code"; fi
    if ((started >= restarts)); then continue; fi # says so above, and ends
    pause=$((first_pause * (started + 1)))
    echo "== again in $pause s (restart $((started + 1)) of $restarts)"
    sleep "$pause" &
    wait $! || true
    if [[ $asked == yes ]]; then exit "$code"; fi
done
