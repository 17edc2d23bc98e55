#!/bin/sh
# Fetches simdjson's amalgamated source from npm into the directory given, if and only if it is the one pinned here.
set -eu
package='@nozbe/simdjson@3.9.4'
sha512='/3oCP8GBpdyeiBMEnuI6S0yl0yekD6Qxfed67hZqU1GIVn3o/vZgE8qANm69THfw7JgHLS9zjx56F/dO3q+koA==' # base64, as npm has it

target=$1
mkdir -p "$target"
scratch=$(mktemp -d "$target/fetch.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

echo "fetching $package"
(cd "$scratch" && npm pack --loglevel=error --no-update-notifier "$package" >/dev/null) || {
  echo "simdjson could not be fetched: 'npm pack $package' failed; is this machine online?" >&2
  exit 1
}
archive=$(echo "$scratch"/*.tgz)
expected=$(echo "$sha512" | base64 -d | od -An -v -tx1 | tr -d ' \n')
actual=$(sha512sum <"$archive" | cut -d' ' -f1)
if [ "$actual" != "$expected" ]; then
  echo "$package is not what it was: its sha512 is $actual, the one pinned in $0 is $expected" >&2
  exit 1
fi
tar -xzf "$archive" -C "$scratch"
mv "$scratch/package/LICENSE" "$scratch/package/src/simdjson.h" "$target/"
touch "$scratch/package/src/simdjson.cpp" # newer than this script, so that make knows it is done
mv "$scratch/package/src/simdjson.cpp" "$target/" # last: it is the file that make looks for
