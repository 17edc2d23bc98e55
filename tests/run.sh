#!/bin/bash
# Runs the whole suite against a built daemon, and builds the other programs on its way. Closes with one line:
# "N passed, N failed" (and ", N skipped").
# usage: tests/run.sh BUILD_DIRECTORY [unit test arguments] -- [end-to-end arguments]
# A part that crashes or says no figures counts as one failure, so that silence can't pass for success.
set -uo pipefail
cd "$(dirname "$0")/.."
build=$1
shift
unit_args=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do unit_args+=("$1") && shift; done
[ $# -gt 0 ] && shift

# A make below this one keeps the variables given (CXX=…) and drops the job server, which recipes don't hand down.
MAKEFLAGS=$(printf '%s' "${MAKEFLAGS:-}" | sed -E 's/(^| )(-j[0-9]*|--jobserver[^ ]*)/\1/g')
export MAKEFLAGS

passed=0 failed=0 skipped=0
output=$(mktemp) said=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$output" "$said"' EXIT

export UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
export TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1}

# count NAME STATUS PASSED FAILED SKIPPED: adds a part's figures; a bad status with no failure in it is one.
count() {
  local name=$1 status=$2 part_failed=$4
  if [ "$status" -ne 0 ] && [ "$part_failed" -eq 0 ]; then
    part_failed=1
    echo "$name: ended with status $status"
  fi
  passed=$((passed + $3)) failed=$((failed + part_failed)) skipped=$((skipped + $5))
}

unit() {
  echo "== unit tests"
  "$build/unit_tests" "${unit_args[@]}" 2>&1 | tee "$output"
  local status=${PIPESTATUS[0]} figures
  # [doctest] test cases: 12 | 12 passed | 0 failed | 3 skipped
  figures=$(sed -n 's/.*test cases: *[0-9]* *| *\([0-9]*\) passed *| *\([0-9]*\) failed *| *\([0-9]*\) skipped.*/\1 \2 \3/p' \
    "$output" | tail -1)
  [ -n "$figures" ] || [ "$status" -ne 0 ] || status='no figures'
  # shellcheck disable=SC2086
  count "unit tests" "$([ "$status" = 'no figures' ] && echo 1 || echo "$status")" ${figures:-0 0 0}
}

# Any program that closes with "N passed, N failed[, N skipped]".
counted() {
  local name=$1 figures status
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$output"
  status=${PIPESTATUS[0]}
  figures=$(sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed\(, \([0-9]*\) skipped\)\{0,1\}$/\1 \2 \4/p' "$output" | tail -1)
  if [ -z "$figures" ] && [ "$status" -eq 0 ]; then
    echo "$name: no closing line"
    status=1
  fi
  read -r p f s <<<"${figures:-0 0 0}"
  count "$name" "$status" "$p" "$f" "${s:-0}"
}

# in_background NAME COMMAND…: begins it, and keeps what it says.
declare -A running
in_background() {
  local name=$1
  shift
  "$@" >"$said/$name" 2>&1 &
  running[$name]=$!
}
# told STATUS NAME: what that one said, with the status that it ended with.
told() {
  cat "$said/$2"
  return "$1"
}

# Two cores are not enough to do one thing after the other in three minutes. The end-to-end tests wait much, so the unit
# tests are compiled beside them. The unit tests keep one core, so beside them run lint, the end-to-end tests that mostly
# wait, and the simulation, which knows no real time.

# The process of the tests keeps the memory that it frees: asked for again, it would cost a fault a page. (run.mjs sees
# to it that the daemons it starts do as they do elsewhere.)
end_to_end=(env MALLOC_TRIM_THRESHOLD_=$((1 << 30)) MALLOC_MMAP_THRESHOLD_=$((1 << 25))
  "${NODE:-node}" tests/e2e/run.mjs --nexus "$build/nexus" "$@")

in_background compiler nice -n 19 make -j"$(nproc)" SAN="${SAN:-}" "$build/unit_tests"
counted "end-to-end tests" "${end_to_end[@]}" --part other
wait "${running[compiler]}" || told $? compiler

in_background simulation nice -n 19 "$build/sim" --test
in_background calm "${end_to_end[@]}" --part calm
in_background lint tools/lint.sh --counted
unit
wait "${running[simulation]}"
counted "simulation" told $? simulation
wait "${running[lint]}"
counted "checks of the source and the manuals" told $? lint
wait "${running[calm]}"
counted "end-to-end tests that mostly wait" told $? calm
[ -n "${SAN:-}" ] || counted "tests of what is installed" tests/install.sh "$build"

echo
if [ "$skipped" -gt 0 ]; then
  echo "$passed passed, $failed failed, $skipped skipped"
else
  echo "$passed passed, $failed failed"
fi
[ "$failed" -eq 0 ]
