#!/bin/bash
# Goal: the Debian package installs, upgrades, is removed and purged as its users expect, and leaves nothing of its own.
# Method: dpkg in a copy of this system that only takes the changes (an overlay, in a mount namespace of this script's own).
# systemctl and deb-systemd-invoke are stand-ins that write down what they are called with.
# Closes with "N passed, N failed, N skipped". usage: tests/package.sh (as root, otherwise it is skipped)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

skip() {
  echo "skipped: the course of a package: $1"
  echo "0 passed, 0 failed, 1 skipped"
  exit 0
}
if [ "${1:-}" != inside ]; then
  [ "$(id -u)" = 0 ] || skip "only root can copy the system"
  command -v dpkg >/dev/null && command -v adduser >/dev/null || skip "no dpkg or no adduser here"
  ! getent passwd nexus >/dev/null || skip "there is a user nexus here"
  unshare --mount true 2>/dev/null || skip "no mount namespace may be made"
  "${MAKE:-make}" -s deb >/dev/null || exit 1
  exec unshare --mount "$0" inside
fi

package=$(find build -maxdepth 1 -name "nexus_*_$(dpkg --print-architecture).deb" -printf '%T@ %p\n' | sort -rn | head -1 | cut -d' ' -f2)
scratch=$(mktemp -d)
passed=0 failed=0
trap 'umount -R "$scratch" 2>/dev/null; rmdir "$scratch"' EXIT
mount -t tmpfs package "$scratch" || skip "no tmpfs may be mounted"
system=$scratch/system changes=$scratch/changes
mkdir "$system" "$changes" "$scratch/work"
mount -t overlay -o "lowerdir=/,upperdir=$changes,workdir=$scratch/work" package "$system" 2>/dev/null || skip "no overlayfs"
mount --rbind /dev "$system/dev" && mount -t proc proc "$system/proc" || skip "no /dev and /proc in the copy"

# What this test puts there itself.
mkdir -p "$system/run/systemd/system" "$system/usr/local/sbin"
cp "$package" "$system/nexus.deb"
for name in systemctl deb-systemd-invoke; do
  printf '#!/bin/sh\necho "${0##*/} $*" >>/calls\n' >"$system/usr/local/sbin/$name"
  chmod +x "$system/usr/local/sbin/$name"
done

inside() {
  chroot "$system" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C DEBIAN_FRONTEND=noninteractive "$@"
}
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
# dpkg, with what it printed in $said and what it had systemd do in $called.
dpkg_does() {
  : >"$system/calls"
  said=$(inside dpkg --force-unsafe-io --force-confold "$@" 2>&1)
  local status=$?
  called=$(cat "$system/calls")
  [ "$status" -eq 0 ] || { echo "$said" && return 1; }
}
has_called() { grep -qE "$1" <<<"$called" || { echo "called: $called" && return 1; }; }
has_not_called() { ! grep -E "$1" <<<"$called"; }
is_state() { [ "$(inside dpkg-query -W -f '${db:Status-Status}' nexus)" = "$1" ]; }

dpkg_does -i /nexus.deb
check "an installation succeeds" is_state installed
check "it starts and enables nothing" has_not_called 'start|enable'
check "it makes a user that cannot log in" inside sh -c 'getent passwd nexus | grep -q ":/nonexistent:/usr/sbin/nologin$"'

logs_are_readable() {
  inside setpriv --reuid nexus --regid nexus --clear-groups sh -c 'umask 0027 && : >/var/log/nexus/access.log' &&
    [ "$(inside stat -c '%U:%G %a' /var/log/nexus /var/log/nexus/access.log | paste -sd,)" = 'nexus:adm 2750,nexus:adm 640' ]
}
check "the group adm reads the logs, others do not" logs_are_readable
check "the unit of the package is no dynamic user's, and its files have that umask" \
  inside sh -c 'cd /usr/lib/systemd/system/nexus.service.d && grep -qx DynamicUser=no debian.conf && grep -qx UMask=0027 debian.conf'
check "the installed binary takes the installed configuration" inside nexus -t

dpkg_does -i /nexus.deb
check "an upgrade restarts a running service" has_called '^deb-systemd-invoke try-restart nexus.service$'

printf '[backend b]\nurl = http://127.0.0.1:1\napi_key_env = NEXUS_KEY_OF_THIS_TEST\n' >>"$system/etc/nexus/nexus.conf"
echo 'NEXUS_KEY_OF_THIS_TEST=sk-test' >"$system/etc/nexus/environment"
dpkg_does -i /nexus.deb
check "it keeps the changed configuration" grep -q NEXUS_KEY_OF_THIS_TEST "$system/etc/nexus/nexus.conf"
check "it reads the variables of the service too" has_called try-restart

echo 'thread = two' >>"$system/etc/nexus/nexus.conf"
dpkg_does -i /nexus.deb
check "an upgrade with a bad configuration succeeds" is_state installed
check "it leaves the running service alone" has_not_called 'restart|stop'
says_why() { grep -q 'nexus.conf:[0-9]*: .*thread' <<<"$said" && grep -q 'not restarted' <<<"$said" || { echo "$said" && return 1; }; }
check "it prints the error and says that the service was not restarted" says_why

# As `systemctl enable` does.
for unit in multi-user.target.wants/nexus.service sockets.target.wants/nexus.socket; do
  mkdir -p "$system/etc/systemd/system/${unit%/*}"
  ln -s "/usr/lib/systemd/system/${unit#*/}" "$system/etc/systemd/system/$unit"
done
dpkg_does -r nexus
check "a removal stops the service" has_called '^deb-systemd-invoke stop nexus.socket nexus.service$'
check "it keeps configuration and logs" \
  test -e "$system/etc/nexus/nexus.conf" -a -e "$system/var/log/nexus/access.log" -a ! -e "$system/usr/bin/nexus"

dpkg_does -P nexus
check "after purging dpkg knows nothing of it" inside sh -c '! dpkg-query -W nexus'

# Of the changes, those that are neither dpkg's own nor a file with the content of before.
left_behind() {
  local path left=0
  while read -r path; do
    [ -c "$changes/$path" ] || ! cmp -s "$changes/$path" "/$path" || continue
    [ ! -d "$changes/$path" ] || [ ! -d "/$path" ] || continue
    echo "$path" && left=1
  done < <(cd "$changes" && find . -mindepth 1 -printf '%P\n' |
    grep -vE '^(var/lib/dpkg|var/cache|run|usr/local|root)(/|$)|^(nexus\.deb|calls|var/log/dpkg\.log)$|^etc/(passwd|group|shadow|gshadow|subuid|subgid)-$|^etc/\.pwd\.lock$|^etc/systemd/system/(multi-user|sockets)\.target\.wants$')
  return $left
}
check "purging leaves the file tree as it was" left_behind

echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ]
