#!/bin/sh
# Writes files as C++ constants to stdout: `tools/embed.sh kName=FILE …`. For each file kName holds its bytes, and
# kNameSha256 its digest in base64, as a Content-Security-Policy names it. Coreutils are enough.
set -eu

cat <<'END'
// Made by tools/embed.sh. Do not edit.
#pragma once

#include <string_view>

namespace nexus {

END
for pair; do
  name=${pair%%=*} file=${pair#*=}
  digest=$(sha256sum <"$file" | cut -c 1-64 | tr a-f A-F | basenc --base16 -d | base64)
  [ ${#digest} -eq 44 ] || { echo "$0: no digest of $file" >&2 && exit 1; }
  printf 'inline constexpr std::string_view %s = R"embedded(' "$name"
  cat "$file"
  printf ')embedded";\ninline constexpr std::string_view %sSha256 = "%s";\n\n' "$name" "$digest"
done
echo '}  // namespace nexus'
