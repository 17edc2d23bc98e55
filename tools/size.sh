#!/bin/bash
# Measures nexus.cpp and nexus/. usage: tools/size.sh            prints the figures
#                                       tools/size.sh long-files | long-functions | arrows
# prints what is over a limit (500 lines a file, 60 a function) or breaks the order of the folders, and fails if anything does.
set -euo pipefail
cd "$(dirname "$0")/.."
layers=(base config net os metrics http api fleet apps proxy server .) # low to high; the last is nexus/*.h and nexus.cpp
most_file_lines=500
most_function_lines=60

sources() { echo nexus.cpp && find nexus -name '*.h' -o -name '*.cpp' | LC_ALL=C sort; }

file_lines() { sources | xargs wc -l | awk '$2 != "total" { print $1, $2 }' | sort -k1,1nr -k2; }

# LINES FILE:LINE: every function, the longest first. As clang-format lays it out, the brace that opens one is the last of
# its line and stands in a namespace or a type; a lambda or a block stands in a function.
functions() {
  sources | xargs awk '
    FNR == 1 { depth = 0; statement = ""; raw = "" }
    raw != "" { if (index($0, raw) == 0) next; $0 = "\"\"" substr($0, index($0, raw) + length(raw)); raw = "" }
    {
      line = $0
      gsub(/\\./, "", line); gsub(/\047[^\047]\047/, "0", line)
      if (match(line, /R"[a-z]*\(/)) { # a raw string: skipped up to its end
        raw = ")" substr(line, RSTART + 2, RLENGTH - 3) "\""
        rest = substr(line, RSTART + RLENGTH)
        if (index(rest, raw) > 0) { line = substr(line, 1, RSTART - 1) substr(rest, index(rest, raw) + length(raw)); raw = "" }
        else line = substr(line, 1, RSTART - 1)
      }
      gsub(/"[^"]*"/, "", line); sub(/\/\/.*/, "", line)
      if (line ~ /^#/ || line ~ /^ *$/) next
      if (statement == "") start = FNR
      statement = statement " " line
      opened = gsub(/\{/, "{", line); closed = gsub(/\}/, "}", line)
      for (change = opened - closed; change > 0; --change) {
        depth += 1
        first[depth] = start
        kind[depth] = kind_of(statement, line)
        if (kind[depth] != "other") statement = ""
      }
      for (; change < 0; ++change) {
        if (kind[depth] == "function" && (depth == 1 || kind[depth - 1] == "scope")) print FNR - first[depth] + 1, FILENAME ":" first[depth]
        depth -= 1
        statement = ""
      }
      if (line ~ /[;}:] *$/ && line !~ /[^:]: *$/) statement = ""
      if (line ~ /^ *(public|private|protected): *$/) statement = ""
    }
    function kind_of(text, last) {
      if (last !~ /(^| )\{ *$/) return "other" # a list of values: clang-format leaves no space before its brace
      if (text ~ /^ *(inline )?namespace/) return "scope"
      if (text ~ /^ *(template <.*> *)?(class|struct|union|enum) / && text !~ /\) *(const|noexcept)? *\{ *$/) return "scope"
      if (text ~ /^ *extern / || text ~ /= *\{ *$/ || text !~ /\(/) return "other"
      return "function"
    }' | sort -k1,1nr -k2
}

# FROM TO: the includes between files of Nexus.
includes() { sources | xargs grep -oE '^#include "nexus/[^"]+"' | sed -E 's/:#include "/ /; s/"$//'; }
# The folder of each: FROM TO, without those that stay in one.
arrows() { includes | sed -E 's,nexus/([a-z]+)/[^ ]*,\1,g; s,nexus[^ ]*\.(h|cpp),.,g' | awk '$1 != $2' | sort -u; }
upward() {
  arrows | awk -v layers="${layers[*]}" '
    BEGIN { n = split(layers, name, " "); for (i = 1; i <= n; ++i) rank[name[i]] = i }
    !($1 in rank) || !($2 in rank) { print "nexus/" $1 " or nexus/" $2 " is not in the list of layers"; next }
    rank[$1] < rank[$2] { print "nexus/" $1 " includes nexus/" $2 ", which is in a higher layer (low to high: " layers ")" }'
}
loops() { tsort 2>&1 >/dev/null | sed -n 's/^tsort: -: input contains a loop:$/a cycle/p; s/^tsort: \([^-]\)/  \1/p'; }

# Prints what it reads, and fails if that is anything.
none() { ! grep .; }

case ${1:-} in
  long-files) file_lines | awk -v most=$most_file_lines '$1 > most { print $2 ": " $1 " lines, more than " most }' | none ;;
  long-functions)
    functions | awk -v most=$most_function_lines '$1 > most { print $2 ": a function of " $1 " lines, more than " most }' | none
    ;;
  arrows) { upward && includes | loops && arrows | loops; } | none ;;
  '')
    row() { printf '%-24s %s\n' "$1" "$2"; }
    row "code lines" "$(sources | xargs cat | grep -cvE '^\s*(//.*)?$')"
    row "files" "$(sources | wc -l)"
    row "longest file" "$(file_lines | head -1)"
    row "files over $most_file_lines lines" "$(file_lines | awk -v most=$most_file_lines '$1 > most' | wc -l)"
    all_functions=$(functions)
    row "functions" "$(wc -l <<<"$all_functions")"
    row "longest function" "$(head -1 <<<"$all_functions")"
    row "functions over $most_function_lines" "$(awk -v most=$most_function_lines '$1 > most' <<<"$all_functions" | wc -l)"
    row "arrows between folders" "$(arrows | wc -l), upward $(upward | wc -l), cycles $(arrows | loops | grep -c '^a cycle' || true)"
    row "cycles between files" "$(includes | loops | grep -c '^a cycle' || true)"
    ;;
  *) echo "usage: tools/size.sh [long-files|long-functions|arrows]" >&2 && exit 2 ;;
esac
