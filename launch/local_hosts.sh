#!/usr/bin/env bash
# Runs an entrypoint as N hosts on this machine, to try out what a pod would do.
#
#   bash launch/local_hosts.sh [--dry-run] N ENTRYPOINT [flags of the entrypoint]
#
# Lines are marked with the number of their host. When one process fails the others are stopped; a
# SIGTERM goes on to all, and they save and stop together.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
[ $# -ge 2 ] || fail "give N and ENTRYPOINT; see the head of launch/local_hosts.sh"
[[ $1 =~ ^[1-9][0-9]*$ ]] || fail "N is $1: give the number of hosts, from 1"
hosts=$1 entrypoint=$2
shift 2
if [ -n "$dry_run" ]; then
  python=python port=PORT # nothing is installed to show what would run
else
  make_environment ''
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
fi

# Line by line: sed would hold lines back until it has some thousand bytes.
mark() {
  trap '' INT TERM # it reads on until its host has left, whoever was told to stop
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

pids=()
trap 'kill ${pids[@]+"${pids[@]}"} 2>/dev/null || true' TERM INT
for ((host = 0; host < hosts; host++)); do
  command=(env "JAX_COORDINATOR_ADDRESS=localhost:$port" "DISTILLSPEC_HOSTS=$hosts"
    "DISTILLSPEC_HOST=$host" "$python" -m "experiments.$entrypoint" "$@")
  if [ -n "$dry_run" ]; then
    words=$(printf ' %q' "${command[@]}")
    echo "${words# }"
  else
    "${command[@]}" > >(mark "$host") 2> >(mark "$host" >&2) &
    pids+=($!)
  fi
done

saved=143 # how a host leaves that was told to stop: the others are still saving
failed() { [ "$1" != 0 ] && [ "$1" != "$saved" ]; }
status=0
while [ "${#pids[@]}" -gt 0 ] && ! failed "$status"; do
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
    else
      code=0
      wait "$pid" || code=$?
      # the first failure stands, whatever those report that ended beside it
      if [ "$code" != 0 ] && ! failed "$status"; then status=$code; fi
    fi
  done
  pids=(${running[@]+"${running[@]}"})
  sleep 0.2 || true # Ctrl-C ends it, too
done
if [ "$status" != 0 ] && [ "${#pids[@]}" -gt 0 ]; then
  kill "${pids[@]}" 2>/dev/null || true
  wait
fi
exit "$status"
