#!/bin/sh
# Installs the Debian packages that it is given, after it has printed which and how much that is. Where it may not install,
# it prints the command to run and fails. With --optional it goes on without a package that can't be installed. Of a|b it
# takes the first that this release has.
set -eu
optional=no
[ "${1:-}" != --optional ] || { optional=yes && shift; }
[ $# -gt 0 ] || { echo "no package is missing" && exit 0; }

if [ "$(id -u)" = 0 ]; then
  as_root=''
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  as_root='sudo -n'
else
  as_root=none
fi
if [ "$as_root" = none ] || ! command -v apt-get >/dev/null; then
  echo "Packages are missing. Run this, then make again:" >&2
  echo "    sudo apt-get install --no-install-recommends $*" | sed 's/[^ ]*|/# or: /g' >&2
  exit 1
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
  $as_root env LC_ALL=C DEBIAN_FRONTEND=noninteractive apt-get -q --no-install-recommends "$@" </dev/null >"$log" 2>&1
}

echo "installing: $*"
apt update || cat "$log" >&2 # the lists that are here may do
for package; do
  shift
  while [ "$package" != "${package#*|}" ] && ! apt-cache show "${package%%|*}" >/dev/null 2>&1; do package=${package#*|}; done
  set -- "$@" "${package%%|*}"
done
apt install --assume-no "$@" || true # it only says what it would do
grep -E 'newly installed|^Need to get|^After this operation' "$log" || true
apt install -y "$@" && exit 0
[ "$optional" = yes ] || { tail -20 "$log" >&2 && exit 1; }

for package; do
  apt install -y "$package" || echo "$package can't be installed: the tests that need it are skipped" >&2
done
