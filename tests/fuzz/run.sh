#!/bin/bash
# Runs the fuzz targets in turn: tests/fuzz/run.sh DIRECTORY SECONDS TARGET…
# Each starts from its committed corpus and the inputs that earlier runs added. Prints its progress every 20 seconds and a
# line per target at the end. A failing input stops its target, is kept in DIRECTORY/finds, and fails the run.
set -uo pipefail
cd "$(dirname "$0")/../.."
directory=$1 seconds=$2
shift 2
finds=$directory/finds
mkdir -p "$finds"
number=0 total=$# failed=0 running=
trap '[ -n "$running" ] && kill "$running" 2>/dev/null; exit 130' INT TERM
for target; do
  number=$((number + 1))
  corpus=$directory/corpus/$target log=$directory/$target.log
  mkdir -p "$corpus"
  started=$SECONDS
  "$directory/$target" "$corpus" "tests/fuzz/corpus/$target" -max_total_time="$seconds" -max_len=4096 -timeout=20 \
    -rss_limit_mb=2048 -dict="tests/fuzz/dictionary" -artifact_prefix="$finds/$target-" -print_final_stats=1 \
    >"$log" 2>&1 &
  running=$!
  said=$SECONDS
  while kill -0 "$running" 2>/dev/null; do
    sleep 1
    [ $((SECONDS - said)) -lt 20 ] && continue
    said=$SECONDS
    left=$(((total - number + 1) * seconds - (SECONDS - started)))
    echo "$target ($number of $total): $((SECONDS - started)) of $seconds s, about $((left > 0 ? left : 0)) s to go for all"
  done
  wait "$running"
  status=$?
  running=
  runs=$(grep -a -o 'stat::number_of_executed_units: *[0-9]*' "$log" | grep -o '[0-9]*$')
  if [ "$status" -eq 0 ]; then
    echo "$target: ${runs:-0} inputs, nothing found"
  else
    failed=$((failed + 1))
    echo "$target: FOUND something: $(grep -a -m1 -E 'what\(\)|ERROR|runtime error' "$log")"
    echo "  see $log and $finds; replay: $directory/$target FILE"
  fi
done
[ "$failed" -eq 0 ]
