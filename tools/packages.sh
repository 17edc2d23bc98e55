#!/bin/sh
# Installs the Debian packages that it is given; where it may not, says which command will.
set -eu
[ $# -gt 0 ] || exit 0

if [ "$(id -u)" = 0 ]; then
  as_root=''
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  as_root='sudo -n'
else
  as_root=none
fi

if [ "$as_root" = none ] || ! command -v apt-get >/dev/null; then
  echo "Nexus needs packages that are not installed. Run this, then make again:" >&2
  echo "    sudo apt-get install $*" >&2
  exit 1
fi

echo "installing: $*"
install() {
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" </dev/null >"$log" 2>&1
}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! install "$@"; then
  $as_root apt-get update -q >/dev/null
  install "$@" || { cat "$log" >&2; exit 1; }
fi
