#!/bin/bash
# Checks what a machine can see of the source and the manuals. One line a check that failed, with what to do.
# With --counted it closes with "N passed, N failed, N skipped", as tests/run.sh wants it.
set -uo pipefail
cd "$(dirname "$0")/.."
passed=0 failed=0 skipped=0

sources() { find nexus.cpp nexus tests bench -name node_modules -prune -o \( -name '*.cpp' -o -name '*.h' \) -print 2>/dev/null; }
texts() { find . \( -name .git -o -name build -o -name node_modules \) -prune -o -type f -print | grep -v '^./tools/lint.sh$'; }

# check NAME COMMAND…: passes if the command succeeds; 77 means that a tool is missing.
check() {
  local name=$1 output status
  shift
  output=$("$@" 2>&1)
  status=$?
  case $status in
    0) passed=$((passed + 1)) ;;
    77) skipped=$((skipped + 1)) && echo "skipped: $name: $output" ;;
    *) failed=$((failed + 1)) && printf 'FAILED: %s\n%s\n' "$name" "$output" ;;
  esac
}

# Other versions lay out differently, so only the one that the code was formatted with is asked.
formatted() {
  local tool=${CLANG_FORMAT:-clang-format}
  command -v "$tool" >/dev/null || { echo "no $tool here" && return 77; }
  "$tool" --version | grep -q 'version 14\.' || { echo "$tool is not version 14" && return 77; }
  sources | xargs -r "$tool" --dry-run -Werror 2>&1 | grep -oE '^[^ :]+:[0-9]+' | sort -u -V | head -40
  [ "${PIPESTATUS[2]}" -ne 0 ] # a line found is a place that differs
}

manual() {
  if command -v mandoc >/dev/null; then
    mandoc -Tlint -W warning "$1"
  elif command -v groff >/dev/null; then
    local messages
    messages=$(groff -ww -mdoc -Tutf8 -z "$1" 2>&1)
    [ -z "$messages" ] || { echo "$messages" && return 1; }
  else
    echo "neither mandoc nor groff here" && return 77
  fi
}

no_match() { ! grep -nE "$@"; }

no_leftovers() { sources | xargs -r grep -nwE 'TODO|FIXME|XXX|HACK|for now|placeholder' && return 1 || return 0; }

# Packages are fetched by name; a lock file or a script that names a server pins a machine to it.
no_registry() { texts | xargs -r -d '\n' grep -nIE '"resolved": *"http|//registry\.' && return 1 || return 0; }

# The folders of nexus/, low to high. An include points into its own folder or a lower one.
layers=(base config net os metrics http api fleet apps proxy server)
layer_of() {
  local i
  for i in "${!layers[@]}"; do [ "${layers[$i]}" != "$1" ] || { echo "$i" && return; }; done
  echo 99 # nexus/daemon.h, nexus.cpp: above all of them
}
includes_point_down() {
  local from to status=0
  while IFS=: read -r from to; do
    [ "$(layer_of "$(basename "$(dirname "$from")")")" -ge "$(layer_of "$(dirname "$to")")" ] && continue
    echo "$from includes nexus/$to, which is in a higher layer (low to high: ${layers[*]})" && status=1
  done < <(grep -roE '#include "nexus/[^"]+"' nexus | sed -E 's,#include "nexus/([^"]+)",\1,')
  return $status
}

header_opens_well() {
  local header status=0
  for header in nexus/*.h nexus/*/*.h; do
    [ "$(head -1 "$header")" = "// $(basename "$header")" ] || { echo "$header: the first line is not its name" && status=1; }
    grep -q '^// Owns: ' "$header" || { echo "$header: does not say what it owns" && status=1; }
    grep -q '^#pragma once$' "$header" || { echo "$header: no #pragma once" && status=1; }
  done
  return $status
}

scripts_parse() {
  local script
  for script in .ci/run tests/*.sh tools/*.sh contrib/debian/p*; do
    case $(head -1 "$script") in *bash*) bash -n "$script" ;; *) sh -n "$script" ;; esac || return 1
  done
}

check "the C++ is formatted (make format does it)" formatted
for page in man/*.[1-8]; do check "$page has no lint" manual "$page"; done
check "no leftover notes to self in the source" no_leftovers
check "no package server is named" no_registry
check "every include points into its own folder or a lower one" includes_point_down
check "every header says what it is" header_opens_well
check "every shell script parses" scripts_parse

[ "${1:-}" = --counted ] && echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
