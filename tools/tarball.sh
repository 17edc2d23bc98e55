#!/bin/sh
# Packs a built nexus for hosts without Debian, to be unpacked below /usr/local: usage: VERSION=… MACHINE=… tools/tarball.sh
# The archive is the same for the same files, whoever makes it and when.
set -eu
cd "$(dirname "$0")/.."
MAKEFLAGS=$(printf '%s' "${MAKEFLAGS:-}" | sed -E 's/(^| )(-j[0-9]*|--jobserver[^ ]*)/\1/g')
export MAKEFLAGS

name=nexus-$VERSION-linux-$MACHINE
root=build/tarball/$name
rm -rf build/tarball
${MAKE:-make} --no-print-directory -s install DESTDIR="$PWD/build/tarball" PREFIX=/usr/local
mv build/tarball/usr/local "$root"
install -m 644 LICENSE contrib/debian/copyright SECURITY.md CHANGELOG.md contrib/logrotate/nexus "$root/share/doc/nexus/"
mv "$root/share/doc/nexus/nexus" "$root/share/doc/nexus/logrotate"
install -m 644 build/deps/simdjson/LICENSE "$root/share/doc/nexus/LICENSE.simdjson"
(cd "$root" && find . -type f ! -name SHA256SUMS -printf '%P\0' | LC_ALL=C sort -z | xargs -0 sha256sum >share/doc/nexus/SHA256SUMS)

tar -C build/tarball --sort=name --mtime="@${SOURCE_DATE_EPOCH:-0}" --owner=0 --group=0 --numeric-owner --mode=u+w,go-w -cf - "$name" |
  gzip -9n >"build/$name.tar.gz"
(cd build && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256" && cat "$name.tar.gz.sha256")
