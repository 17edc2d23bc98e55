#!/bin/sh
# Prints the source file given with every file of this project that it includes in its place, each once, behind the command
# that compiles the result. System headers and those of libraries stay includes. usage: tools/single.sh FILE COMMAND
set -eu
source=$1 command=$2
echo "// The whole of Nexus in one file, written by \`make single\`. Compile it in the project's directory:"
echo "// $command"
echo
exec awk '
function is_here(file,    line, found) {
  found = (getline line < file) >= 0
  close(file)
  return found
}
function print_file(file,    line, included) {
  printed[file] = 1
  while ((getline line < file) > 0) {
    included = line
    if (line == "#pragma once") continue
    if (!sub(/^#include "/, "", included) || !sub(/".*/, "", included)) print line
    else if (included in printed) continue
    else if (is_here(included)) print_file(included)
    else print line
  }
  close(file)
}
BEGIN { print_file(ARGV[1]) }' "$source"
