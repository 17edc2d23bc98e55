#!/bin/sh
# Installs the Debian packages that it is given, after it has printed which and how much that is. Where it may not install,
# it prints the commands to run and fails. With --optional it goes on without a package that can't be installed. Of a|b it
# takes the first that this release has. A package that is installed already is an error: something else is wrong then, and
# to install it again would not help.
set -eu
optional=no
[ "${1:-}" != --optional ] || { optional=yes && shift; }
[ $# -gt 0 ] || { echo "no package is missing" && exit 0; }

if ! command -v apt-get >/dev/null; then
  echo "These are missing, by their names in Debian; install them with this system's own tools, then make again:" >&2
  echo "    $*" | sed 's/|/ or /g' >&2
  exit 1
fi
if [ "$(id -u)" = 0 ]; then
  as_root=''
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  as_root='sudo -n'
else
  as_root=none
fi

is_known() { apt-cache show "$1" >/dev/null 2>&1; }
is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
  $as_root env LC_ALL=C DEBIAN_FRONTEND=noninteractive apt-get -q --no-install-recommends "$@" </dev/null >"$log" 2>&1
}

# The lists that are here may do if they can't be fetched.
[ "$as_root" = none ] || { echo "reading the package lists" && { apt update || cat "$log" >&2; }; }
lists=here other=''
for package; do
  shift
  all=$package
  while [ "$package" != "${package#*|}" ] && ! is_known "${package%%|*}"; do package=${package#*|}; done
  if ! is_known "${package%%|*}"; then
    package=$all lists=lacking
    [ "$all" = "${all#*|}" ] || other="    # where there is no ${all%%|*}: ${all#*|}"
  fi
  set -- "$@" "${package%%|*}"
  if is_installed "${package%%|*}"; then
    echo "${package%%|*} is installed, but what make needs of it is not found: is it in PATH, and is CXX= right?" >&2
    echo "If files of it are missing: apt-get install --reinstall ${package%%|*}" >&2
    exit 1
  fi
done

if [ "$as_root" = none ]; then
  echo "Packages are missing. These commands install all of them, those of the tests too; then make again:" >&2
  [ $lists = here ] || echo "    sudo apt-get update" >&2
  echo "    sudo apt-get install --no-install-recommends $*" >&2
  [ -z "$other" ] || echo "$other" >&2
  exit 1
fi

echo "installing: $*"
apt install --assume-no "$@" || true # it only says what it would do
grep -E 'newly installed|^Need to get|^After this operation' "$log" || true
echo "downloading and installing; then make goes on"
apt install -y "$@" && exit 0
[ "$optional" = yes ] || { tail -20 "$log" >&2 && exit 1; }

for package; do
  apt install -y "$package" || echo "$package can't be installed: the tests that need it are skipped" >&2
done
