#!/bin/bash
# Goal: what `make install`, `make tarball`, `make deb` and `make single` write is complete and works, and `make uninstall` removes it.
# Method: both install into a scratch directory; the package is unpacked, not installed.
# Closes with "N passed, N failed, N skipped". usage: tests/install.sh BUILD_DIRECTORY
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
build=$1
passed=0 failed=0 skipped=0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

check() {
  local name=$1 output
  shift
  if output=$("$@" 2>&1); then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    printf 'FAILED: %s\n%s\n' "$name" "$output"
  fi
}

files() { (cd "$1" && find . -type f | sort); }

is_list() { diff <(files "$1") <(printf '%s\n' "${@:2}" | sort); }

starts_nexus_of() { grep -qx "ExecStart=$2 -c /etc/nexus/nexus.conf" "$1"; }

installs() { ${MAKE:-make} -s install DESTDIR="$scratch/installed" PREFIX=/opt/nexus; }
uninstalls() {
  ${MAKE:-make} -s uninstall DESTDIR="$scratch/installed" PREFIX=/opt/nexus && [ -z "$(files "$scratch/installed")" ]
}

check "make install installs" installs
check "make install puts each file in its place" is_list "$scratch/installed/opt/nexus" ./bin/nexus \
  ./lib/systemd/system/nexus.service ./lib/systemd/system/nexus.socket ./share/doc/nexus/nexus.conf.example ./share/doc/nexus/runbook.md \
  ./share/man/man5/nexus.conf.5 ./share/man/man8/nexus.8
check "the installed unit starts the installed binary" \
  starts_nexus_of "$scratch/installed/opt/nexus/lib/systemd/system/nexus.service" /opt/nexus/bin/nexus
check "the installed example is a configuration that nexus takes" \
  "$scratch/installed/opt/nexus/bin/nexus" -t -c "$scratch/installed/opt/nexus/share/doc/nexus/nexus.conf.example"
check "make uninstall leaves no file" uninstalls

# The command in the second line of the single file compiles it, and with it llhttp and simdjson.
single_compiles() {
  local command
  command=$(sed -n '2s,^// ,,p' build/nexus.single.cpp)
  [ -n "$command" ] && $command -fsyntax-only
}
includes_nothing_of_nexus() { ! grep -n '^#include "\(nexus\|build\)/' build/nexus.single.cpp; }

check "make single writes build/nexus.single.cpp" "${MAKE:-make}" -s single
check "build/nexus.single.cpp includes no file of Nexus" includes_nothing_of_nexus
check "build/nexus.single.cpp compiles with the command in it" single_compiles

is_static_and_small() {
  [ "$(stat -c %s "$build/nexus")" -lt 12000000 ] && ! ldd "$build/nexus" 2>&1 | grep -q '=>'
}
check "the binary is static and under 12 MB" is_static_and_small

packs() { rm -f build/nexus-*.tar.gz && ${MAKE:-make} -s tarball && ls build/nexus-*.tar.gz; }
unpacks() {
  local archive
  archive=$(echo build/nexus-*.tar.gz)
  (cd build && sha256sum --quiet -c "${archive#build/}.sha256") && mkdir "$scratch/local" &&
    tar -xzf "$archive" -C "$scratch/local" --strip-components=1 &&
    (cd "$scratch/local" && sha256sum --quiet -c share/doc/nexus/SHA256SUMS)
}
is_same_again() {
  local archive before
  archive=$(echo build/nexus-*.tar.gz)
  before=$(sha256sum <"$archive") && ${MAKE:-make} -s tarball && [ "$(sha256sum <"$archive")" = "$before" ]
}
check "make tarball packs an archive" packs
check "its checksums are right" unpacks
check "it has binary, manuals, units, example and licenses" is_list "$scratch/local" ./bin/nexus ./lib/systemd/system/nexus.service \
  ./lib/systemd/system/nexus.socket ./share/man/man5/nexus.conf.5 ./share/man/man8/nexus.8 \
  $(printf './share/doc/nexus/%s ' CHANGELOG.md LICENSE LICENSE.simdjson SECURITY.md SHA256SUMS copyright logrotate nexus.conf.example runbook.md)
check "its unit starts the binary in /usr/local" starts_nexus_of "$scratch/local/lib/systemd/system/nexus.service" /usr/local/bin/nexus
check "the same files make the same archive" is_same_again

if command -v dpkg-deb >/dev/null; then
  check "make deb makes a package" "${MAKE:-make}" -s deb
  package=$(find build -maxdepth 1 -name 'nexus_*.deb' -newer "$scratch" | head -1)
  check "the package unpacks" dpkg-deb -x "$package" "$scratch/deb"
  check "the package puts each file in its place" is_list "$scratch/deb" ./etc/logrotate.d/nexus ./etc/nexus/nexus.conf \
    ./usr/lib/systemd/system/nexus.service ./usr/lib/systemd/system/nexus.socket \
    ./usr/lib/systemd/system/nexus.service.d/debian.conf ./usr/bin/nexus ./usr/share/doc/nexus/changelog.gz \
    ./usr/share/doc/nexus/copyright ./usr/share/doc/nexus/nexus.conf.example ./usr/share/doc/nexus/runbook.md ./usr/share/lintian/overrides/nexus \
    ./usr/share/man/man5/nexus.conf.5.gz ./usr/share/man/man8/nexus.8.gz
  check "the packaged unit starts the packaged binary" \
    starts_nexus_of "$scratch/deb/usr/lib/systemd/system/nexus.service" /usr/bin/nexus
  check "the packaged configuration is one that nexus takes" "$scratch/deb/usr/bin/nexus" -t -c "$scratch/deb/etc/nexus/nexus.conf"
  check "an upgrade keeps the operator's configuration" \
    grep -qx /etc/nexus/nexus.conf <(dpkg-deb --info "$package" conffiles)
  names_libraries() {
    local name
    for name in llhttp simdjson c-ares glibc libstdc++; do grep -q "^Files: .*$name" "$scratch/deb/usr/share/doc/nexus/copyright" || return 1; done
    dpkg-deb --field "$package" Built-Using | grep -qE 'c-ares \(= .*gcc-.* \(= .*glibc \(= '
  }
  check "the package names the libraries in the binary, with their licenses and versions" names_libraries
  newest_is_this() {
    [ "$(zcat "$scratch/deb/usr/share/doc/nexus/changelog.gz" | head -1)" = "nexus ($("$build/nexus" --version | cut -d' ' -f2)) stable; urgency=medium" ]
  }
  check "the changelog's newest release is this version" newest_is_this
  if command -v lintian >/dev/null; then
    check "lintian finds nothing in the package" lintian --allow-root --fail-on error,warning "$package"
  else
    skipped=$((skipped + 1))
    echo "skipped: lintian is not installed"
  fi
else
  skipped=$((skipped + 1))
  echo "skipped: the Debian package: no dpkg-deb here"
fi

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
