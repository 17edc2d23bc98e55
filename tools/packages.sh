#!/bin/sh
# Installs the Debian packages that it is given; where it may not, says which command will.
# With --optional before them, whatever can't be installed is named in one line, and that is no failure.
# No daemon among them is started or enabled: the tests start their own, on ports of their own.
set -eu
optional=no
[ "${1:-}" != --optional ] || { optional=yes && shift; }
[ $# -gt 0 ] || exit 0

go_without() {
  echo "going on without $*: tests that need it are skipped (sudo apt-get install $*)" >&2
  exit 0
}

if [ "$(id -u)" = 0 ]; then
  as_root=''
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  as_root='sudo -n'
else
  as_root=none
fi

if [ "$as_root" = none ] || ! command -v apt-get >/dev/null; then
  [ "$optional" = no ] || go_without "$@"
  echo "Nexus needs packages that are not installed. Run this, then make again:" >&2
  echo "    sudo apt-get install $*" >&2
  exit 1
fi

enabled_units() {
  [ ! -d /run/systemd/system ] || systemctl list-unit-files --state=enabled --no-legend 2>/dev/null | cut -d' ' -f1 | sort
}

# What a package's scripts ask before they start its service (deb-systemd-invoke, invoke-rc.d): 101 is no. One that is
# here already stays as it is; ours goes away whatever ends the run.
policy=/usr/sbin/policy-rc.d
ours=no
log=$(mktemp)
units=$(mktemp)
clean_up() {
  rm -f "$log" "$units"
  [ "$ours" = no ] || $as_root rm -f "$policy"
}
trap clean_up EXIT
trap 'exit 1' HUP INT TERM
if [ ! -e "$policy" ]; then
  ours=yes
  printf '#!/bin/sh\nexit 101\n' >"$log"
  $as_root install -m 755 "$log" "$policy"
fi
enabled_units >"$units"

install_all() {
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" </dev/null >"$log" 2>&1
}

echo "installing: $*"
if ! install_all "$@"; then
  $as_root apt-get update -q >/dev/null 2>"$log" || cat "$log" >&2
  if ! install_all "$@"; then
    tail -20 "$log" >&2
    # One that is missing must not keep the others out.
    [ "$optional" = yes ] || exit 1
    missing=''
    for package in "$@"; do install_all "$package" || missing="$missing $package"; done
    # shellcheck disable=SC2086
    [ -z "$missing" ] || go_without $missing
  fi
fi
for unit in $(enabled_units | comm -13 "$units" -); do $as_root systemctl disable -q "$unit" || true; done
