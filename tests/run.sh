#!/bin/bash
# Runs every test of a built daemon, one part after the other, and closes with "N passed, N failed[, N skipped]".
# A part that crashes or prints no figures counts as one failure.
# usage: tests/run.sh BUILD_DIRECTORY [unit test arguments] -- [end-to-end arguments]
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
build=$1
shift
unit_args=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do unit_args+=("$1") && shift; done
[ $# -gt 0 ] && shift

# A make started by a test keeps the variables given (CXX=…) and drops the job server, which is not handed down to it.
MAKEFLAGS=$(printf '%s' "${MAKEFLAGS:-}" | sed -E 's/(^| )(-j[0-9]*|--jobserver[^ ]*)/\1/g')
export MAKEFLAGS
export UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
export TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1}

passed=0 failed=0 skipped=0
output=$(mktemp)
trap 'rm -f "$output"' EXIT

# part NAME FIGURES COMMAND…: runs a program and adds its figures. FIGURES is the sed expression that makes "PASSED FAILED
# SKIPPED" of its closing line.
part() {
  local name=$1 figures=$2 status p f s
  shift 2
  echo "== $name"
  "$@" 2>&1 | tee "$output"
  status=${PIPESTATUS[0]}
  read -r p f s < <(sed -nE "$figures" "$output" | tail -1)
  if [ -z "$p" ] || { [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; }; then
    echo "$name: ended with status $status${p:+ and no failure}"
    f=1
  fi
  passed=$((passed + ${p:-0})) failed=$((failed + f)) skipped=$((skipped + ${s:-0}))
}
counted='s/^([0-9]+) passed, ([0-9]+) failed(, ([0-9]+) skipped)?$/\1 \2 \4/p'
doctest='s/.*test cases: *[0-9]+ *\| *([0-9]+) passed *\| *([0-9]+) failed *\| *([0-9]+) skipped.*/\1 \2 \3/p'

if [ -n "${EMULATOR:-}" ]; then
  # Programs of another architecture run in an emulator, twenty times as slowly: not the tests that compute for minutes there,
  # and not the one of what /proc says of this process, which the emulator makes up.
  printf '#!/bin/sh\nexec %s %s "$@"\n' "$EMULATOR" "$PWD/$build/nexus" >"$build/nexus-emulated"
  chmod +x "$build/nexus-emulated"
  long='*every cut*,*it is cut*,*extra event*,*no series comes twice*,*unsent pages*,*in step starves*,*any bytes are read*'
  long+=',*random*,*fuzz target*,*hostile requests*,*out of another one*,*150 MB*,*page is whole*,*large question*'
  long+=',*every allocation of a handshake*,*however they are cut*,*which event is the extra one*,*strategy shares the load*'
  long+=',*long values are read in pieces*,*a short skeleton*,*this process has memory*'
  part "unit tests" "$doctest" "$EMULATOR" "$build/unit_tests" "--test-case-exclude=$long" "${unit_args[@]}"
  part "simulation" "$counted" "$EMULATOR" "$build/sim" 1..200
  part "end-to-end tests" "$counted" "${NODE:-node}" tests/e2e/run.mjs --nexus "$build/nexus-emulated" --only demo
else
  part "checks of the source and the manuals" "$counted" tools/lint.sh --counted
  part "unit tests" "$doctest" "$build/unit_tests" "${unit_args[@]}"
  part "simulation" "$counted" "$build/sim" --test
  part "end-to-end tests" "$counted" "${NODE:-node}" tests/e2e/run.mjs --nexus "$build/nexus" "$@"
  for name in chaos reconciliation; do
    part "the same over TLS: $name" "$counted" "${NODE:-node}" tests/e2e/run.mjs --nexus "$build/nexus" --tls --only $name
  done
  [ -n "${SAN:-}" ] || part "tests of what is installed" "$counted" tests/install.sh "$build"
  [ -n "${SAN:-}" ] || part "the course of a package" "$counted" tests/package.sh
fi

echo
echo "$passed passed, $failed failed$([ "$skipped" -eq 0 ] || echo ", $skipped skipped")"
[ "$failed" -eq 0 ]
