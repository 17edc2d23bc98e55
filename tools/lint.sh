#!/bin/bash
# Checks the source and the manuals for what a machine can see, and prints each place that breaks a rule.
# With --counted it closes with "N passed, N failed, N skipped" for tests/run.sh.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
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

# The first line is its name; then come "Owns:" and, as the last of the opening comment, "Tested by:" with paths below tests/.
header_opens_well() {
  local header path status=0
  while read -r header path; do
    case $path in
      tests/*) [ -e "$path" ] || { echo "$header: tested by $path, which does not exist" && status=1; } ;;
      *) echo "$header: $path" && status=1 ;;
    esac
  done < <(find nexus -name '*.h' | sort | xargs awk '
    function end_header() {
      if (!owns) print header, "no line \"// Owns:\""
      if (!tests) print header, "no \"// Tested by: tests/…\""
      if (!once) print header, "no #pragma once"
    }
    FNR == 1 {
      if (header) end_header()
      header = FILENAME
      owns = tested = tests = once = 0
      opening = 1
      name = FILENAME
      sub(/.*\//, "", name)
      if ($0 != "// " name) print header, "the first line is not its name"
    }
    !/^\/\// { opening = 0 }
    /^#pragma once$/ { once = 1 }
    opening && /^\/\/ Owns: / { owns = 1 }
    opening && /^\/\/ Tested by: / { tested = 1 }
    opening && tested {
      for (line = $0; match(line, /tests\/[A-Za-z0-9_.\/-]*[A-Za-z0-9_\/]/); line = substr(line, RSTART + RLENGTH)) {
        tests = 1
        print header, substr(line, RSTART, RLENGTH)
      }
    }
    END { end_header() }')
  return $status
}

header_is_used() {
  local unused
  unused=$(comm -23 <(find nexus -name '*.h' | sort) <(grep -rhoE '^#include "nexus/[^"]+' nexus.cpp nexus | cut -d'"' -f2 | sort -u))
  [ -z "$unused" ] || { echo "included by no file of Nexus: $unused" && return 1; }
}

# Checks every file, and every folder that is written with a slash: nexus/base or base/. The folder of a header, and nexus/,
# may be left out.
map_names_what_exists() {
  local name status=0
  [ -e ARCHITECTURE.md ] || return 0
  while read -r name; do
    # shellcheck disable=SC2086
    [ -n "$(ls -d $name nexus/$name nexus/*/$name 2>/dev/null)" ] || { echo "ARCHITECTURE.md names $name, which does not exist" && status=1; }
  done < <(sed -E 's,https?://[^ )]*,,g' ARCHITECTURE.md | grep -oE '[A-Za-z0-9_./*-]+' | sed 's/[.-]*$//' |
    grep -E '^[^/].*(\.(h|cpp|mjs|js|html|css|mk|sh|md)|/)$|^(nexus|tests|bench|tools|contrib|man)/' | sort -u)
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
check "every include points into its own folder or a lower one, and none in a circle" tools/size.sh arrows
check "no file is over 500 lines" tools/size.sh long-files
check "no function is over 60 lines" tools/size.sh long-functions
check "every header opens with its name, what it owns and the tests that it has" header_opens_well
check "every header is included by another file of Nexus" header_is_used
check "every file and folder that ARCHITECTURE.md names exists" map_names_what_exists
check "every shell script parses" scripts_parse

[ "${1:-}" = --counted ] && echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
