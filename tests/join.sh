#!/bin/sh
# Prints a source that includes the test files given, each in a namespace of its own: tests/join.sh FILE…
# Their includes come first, outside of every namespace, so that each header is read once.
set -eu
cat "$@" | grep "^#include" | LC_ALL=C sort -u
for file; do
  printf '\nnamespace %s {\n#include "%s"\n}\n' "$(basename "$file" .cpp)" "$file"
done
