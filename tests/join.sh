#!/bin/sh
# Prints one source that holds the test files given, each in a namespace of its own: tests/join.sh FILE…
# Their headers come first, outside of any namespace, and so are read once for all of them.
set -eu
cat "$@" | grep "^#include" | LC_ALL=C sort -u
for file; do
  printf '\nnamespace %s {\n#include "%s"\n}\n' "$(basename "$file" .cpp)" "$file"
done
