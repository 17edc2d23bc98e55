#!/bin/sh
# Makes a Debian package of a built nexus: usage: VERSION=… MACHINE=… MAINTAINER=… CXX=… tools/deb.sh
set -eu
cd "$(dirname "$0")/.."
# A make below this one keeps the variables given (CXX=…) and drops the job server, which recipes don't hand down.
MAKEFLAGS=$(printf '%s' "${MAKEFLAGS:-}" | sed -E 's/(^| )(-j[0-9]*|--jobserver[^ ]*)/\1/g')
export MAKEFLAGS

root=build/deb
doc=$root/usr/share/doc/nexus
case $MACHINE in
  x86_64) architecture=amd64 ;;
  aarch64) architecture=arm64 ;;
  *) architecture=$(dpkg --print-architecture) ;;
esac

# The Debian packages whose static libraries the binary holds, in Debian's form.
built_using() {
  for library in libc.a libstdc++.a libcares.a libssl.a; do readlink -f "$($CXX -print-file-name=$library)"; done |
    xargs dpkg -S 2>/dev/null | cut -d: -f1 | { cat && echo libllhttp-dev && echo node-llhttp; } | sort -u |
    xargs dpkg-query -W -f '${db:Status-Abbrev} ${source:Package} (= ${source:Version})\n' 2>/dev/null |
    sed -n 's/^ii *//p' | sort -u | paste -s -d, | sed 's/,/, /g'
}

# Debian's form of CHANGELOG.md: its dated releases, newest first.
changelog() {
  awk -v by="$MAINTAINER" '
    function print_item(    words, count, i, line) {
      count = split(item, words, " ")
      line = "  *"
      for (i = 1; i <= count; i++) {
        if (length(line " " words[i]) > 79) {
          print line
          line = "   "
        }
        line = line " " words[i]
      }
      if (count) print line
      item = ""
    }
    function end() {
      print_item()
      command = "date -u -R -d " date
      command | getline stamp
      close(command)
      printf "\n -- %s  %s\n", by, stamp
    }
    /^## \[[0-9]/ {
      if (version != "") end()
      version = $2
      gsub(/[][]/, "", version)
      date = $4
      printf "%snexus (%s) stable; urgency=medium\n\n", entries++ ? "\n" : "", version
      next
    }
    version == "" || /^#/ { next }
    /^- / { print_item() }
    /^- |^ / { item = item substr($0, 2) }
    END { if (version != "") end() }' CHANGELOG.md
}

rm -rf "$root"
${MAKE:-make} --no-print-directory -s install DESTDIR="$PWD/$root" PREFIX=/usr
mkdir -p "$root/DEBIAN" "$root/usr/share/lintian/overrides"
install -D -m 644 nexus.conf.example "$root/etc/nexus/nexus.conf"
install -D -m 644 contrib/logrotate/nexus "$root/etc/logrotate.d/nexus"
install -D -m 644 contrib/debian/nexus.service.conf "$root/usr/lib/systemd/system/nexus.service.d/debian.conf"
install -m 644 contrib/debian/copyright "$doc/copyright"
install -m 644 contrib/debian/lintian-overrides "$root/usr/share/lintian/overrides/nexus"
changelog >"$doc/changelog"
gzip -9n "$root"/usr/share/man/man*/* "$doc/changelog"

printf '%s\n' /etc/nexus/nexus.conf /etc/logrotate.d/nexus >"$root/DEBIAN/conffiles"
sed -e "s/@VERSION@/$VERSION/" -e "s/@MAINTAINER@/$MAINTAINER/" -e "s/@ARCHITECTURE@/$architecture/" -e "s/@BUILT_USING@/$(built_using)/" \
  -e "s/@SIZE@/$(du -k -s --apparent-size --exclude=DEBIAN "$root" | cut -f1)/" contrib/debian/control |
  sed '/^Built-Using: $/d' >"$root/DEBIAN/control"
install -m 755 contrib/debian/postinst contrib/debian/prerm contrib/debian/postrm "$root/DEBIAN/"
(cd "$root" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | sort -z | xargs -0 md5sum >DEBIAN/md5sums)

dpkg-deb --root-owner-group --build "$root" "build/nexus_${VERSION}_$architecture.deb"
