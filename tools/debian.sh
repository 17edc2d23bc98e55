#!/bin/bash
# Runs the two commands of the README in a bare Debian: `make run` up to its first answer, then `make test`.
# usage: tools/debian.sh SUITE [COMMAND]    as root, with debootstrap; SUITE is bookworm (12), trixie (13) or a later one;
#                                           COMMAND instead of the two, for instance 'make deps && make unit CXX=clang++-19'
# The system is made once, by `debootstrap --variant=minbase`, in build/debian/SUITE, with this machine's apt settings and
# certificates. What is tested is the last commit. There is no init system in it, and by NETLESS=1 no network but loopback while
# the command runs, so that /proc/sys/net/ipv4/tcp_mem and others that only the first network namespace has are missing.
set -euo pipefail
cd "$(dirname "$0")/.."
suite=${1:?usage: tools/debian.sh SUITE [COMMAND]}
command=${2:-}
root=$PWD/build/debian/$suite
mirror=${MIRROR:-http://deb.debian.org/debian}

[ "$(id -u)" = 0 ] || { echo "tools/debian.sh: only root may make a Debian in a folder" >&2 && exit 1; }
command -v debootstrap >/dev/null || { echo "tools/debian.sh: install debootstrap" >&2 && exit 1; }

mounted=()
unmount() {
  local i
  for ((i = ${#mounted[@]} - 1; i >= 0; i--)); do umount -l "${mounted[i]}" || true; done
}
trap unmount EXIT
mount_at() { mount "${@:2}" "$root/$1" && mounted+=("$root/$1"); }

if [ ! -e "$root/made" ]; then
  rm -rf "$root"
  mkdir -p "$root"
  debootstrap --variant=minbase "$suite" "$root" "$mirror" >"$root.log" 2>&1 || { tail -5 "$root.log" >&2 && exit 1; }
  cp -a /etc/apt/apt.conf.d/. "$root/etc/apt/apt.conf.d/"
  touch "$root/made"
fi
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
mkdir -p "$root/usr/local/share/ca-certificates"
cp -rL /usr/local/share/ca-certificates/. "$root/usr/local/share/ca-certificates/" 2>/dev/null || true
cp -L "${HOME:-/root}/.npmrc" "$root/root/" 2>/dev/null || true

mount_at proc -t proc proc
mount_at sys -t sysfs -o ro sys
mount_at dev --rbind /dev
mount_at tmp -t tmpfs tmp

# inside COMMAND: in the system, as root. alone COMMAND: the same without a network but loopback, where NETLESS is set.
in_root=(chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 bash -euo pipefail -c)
inside() { "${in_root[@]}" "cd /root && $1"; }
alone() {
  if [ -z "${NETLESS:-}" ]; then
    inside "$1"
    return
  fi
  unshare --net --mount -- bash -c "ip link set lo up && mount -t proc proc '$root/proc' && exec \"\$@\"" - "${in_root[@]}" "cd /root && $1"
}

inside 'command -v make >/dev/null && command -v git >/dev/null ||
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends make git ca-certificates; } >/tmp/log 2>&1 ||
  { tail /tmp/log && exit 1; }'
mkdir -p "$root/root/nexus"
git archive HEAD | tar -x -C "$root/root/nexus"
inside 'cd /root/nexus && { [ -d .git ] || git init -q; } && git add -A && git -c user.name=t -c user.email=t@t commit -qm "the tree" || true'

if [ -n "$command" ]; then
  alone "cd nexus && $command"
  exit
fi
inside 'cd nexus && make deps && make build/deps/test-modules all'
# The demonstration of `make run` is up when its health page answers.
inside 'set -m; { cd nexus && make run; } >/tmp/run.log 2>&1 & trap "kill %1" EXIT # with -m: all of the job, not its shell
  for _ in $(seq 100); do
    if { exec 4<>/dev/tcp/127.0.0.1/8000; } 2>/dev/null; then break; fi
    sleep 0.1
  done
  printf "GET /health HTTP/1.0\r\n\r\n" >&4 && head -1 <&4 | grep " 200 " && echo "make run: it answers"'
alone 'cd nexus && make test'
