#!/bin/sh
# Makes a Debian package of a built nexus: usage: tools/deb.sh build/nexus
set -eu
cd "$(dirname "$0")/.."
# A make below this one keeps the variables given (CXX=…) and drops the job server, which recipes don't hand down.
MAKEFLAGS=$(printf '%s' "${MAKEFLAGS:-}" | sed -E 's/(^| )(-j[0-9]*|--jobserver[^ ]*)/\1/g')
export MAKEFLAGS

binary=$1
root=build/deb
version=$("$binary" --version | sed -n 's/.*\([0-9][0-9]*\.[0-9][0-9]*\.[0-9][0-9]*\).*/\1/p' | head -1)
[ -n "$version" ] || { echo "'$binary --version' names no version" >&2; exit 1; }
architecture=$(dpkg --print-architecture)

rm -rf "$root"
${MAKE:-make} --no-print-directory -s install DESTDIR="$PWD/$root" PREFIX=/usr
mkdir -p "$root/lib" "$root/etc/nexus" "$root/DEBIAN"
mv "$root/usr/lib/systemd" "$root/lib/systemd" && rmdir "$root/usr/lib"
install -m 644 nexus.conf.example "$root/etc/nexus/nexus.conf"
install -D -m 644 contrib/logrotate/nexus "$root/etc/logrotate.d/nexus"
gzip -9n "$root"/usr/share/man/man*/*

# The binary holds these libraries, so their terms travel with it.
{
  for package in libllhttp-dev node-llhttp libc-ares-dev; do
    [ ! -r "/usr/share/doc/$package/copyright" ] || { echo "==== $package"; cat "/usr/share/doc/$package/copyright"; echo; }
  done
  echo "==== simdjson" && cat build/deps/simdjson/LICENSE
} >"$root/usr/share/doc/nexus/copyright"
chmod 644 "$root/usr/share/doc/nexus/copyright"

printf '%s\n' /etc/nexus/nexus.conf /etc/logrotate.d/nexus >"$root/DEBIAN/conffiles"
sed -e "s/@VERSION@/$version/" -e "s/@ARCHITECTURE@/$architecture/" \
  -e "s/@SIZE@/$(du -k -s --exclude=DEBIAN "$root" | cut -f1)/" contrib/debian/control >"$root/DEBIAN/control"
install -m 755 contrib/debian/postinst contrib/debian/prerm contrib/debian/postrm "$root/DEBIAN/"
(cd "$root" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | xargs -0 md5sum >DEBIAN/md5sums)

dpkg-deb --root-owner-group --build "$root" "build/nexus_${version}_$architecture.deb"
