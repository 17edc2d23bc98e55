#!/bin/bash
# Runs the two commands of the README in a bare Debian: `make run` up to its first answer, then `make test`.
# usage: tools/debian.sh SUITE [COMMAND]    as root, with debootstrap; SUITE is bookworm (12), trixie (13) or a later one;
#                                           COMMAND instead of the two, for instance 'make deps && make unit CXX=clang++-19'
# By AS_USER=1 the two commands are an ordinary user's, in a new system: make may not install anything there, and root installs
# what its message names.
# The system is made once, by `debootstrap --variant=minbase`, in build/debian/SUITE, with this machine's apt settings and
# certificates. What is tested is the last commit. There is no init system in it, and by NETLESS=1 no network but loopback while
# the command runs, so that /proc/sys/net/ipv4/tcp_mem and others that only the first network namespace has are missing.
set -euo pipefail
cd "$(dirname "$0")/.."
suite=${1:?usage: tools/debian.sh SUITE [COMMAND]}
command=${2:-}
user=root home=/root
[ -z "${AS_USER:-}" ] || user=guest home=/home/guest
root=$PWD/build/debian/$suite${AS_USER:+-user}
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

if [ -n "${AS_USER:-}" ] || [ ! -e "$root/made" ]; then
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

# as USER COMMAND: in the system. alone COMMAND: as who runs the two, and without a network but loopback where NETLESS is set.
in_root() { echo chroot --userspec="$1" "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME="$home" LC_ALL=C.UTF-8; }
as() { $(in_root "$1") bash -euo pipefail -c "cd $home && $2"; }
alone() {
  if [ -z "${NETLESS:-}" ]; then
    as $user "$1"
    return
  fi
  unshare --net --mount -- bash -c "ip link set lo up && mount -t proc proc '$root/proc' && exec \"\$@\"" - \
    $(in_root $user) bash -euo pipefail -c "cd $home && $1"
}

[ $user = root ] || chroot "$root" useradd --create-home --shell /bin/bash $user
[ $user = root ] || cp -L "${HOME:-/root}/.npmrc" "$root$home/" 2>/dev/null || true
as root 'command -v make >/dev/null && command -v git >/dev/null ||
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends make git ca-certificates; } >/tmp/log 2>&1 ||
  { tail /tmp/log && exit 1; }'
mkdir -p "$root$home/nexus"
git archive HEAD | tar -x -C "$root$home/nexus"
chroot "$root" chown -R $user: "$home"
as $user 'cd nexus && { [ -d .git ] || git init -q; } && git add -A && git -c user.name=t -c user.email=t@t commit -qm "the tree" || true'

if [ -n "$command" ]; then
  alone "cd nexus && $command"
  exit
fi
if [ $user = root ]; then
  as root 'cd nexus && make deps'
else
  if as $user 'cd nexus && make run' >"$root/tmp/message" 2>&1; then
    echo "make run: nothing was missing" && exit 1
  fi
  cat "$root/tmp/message"
  named=$(sed -n 's/^    sudo \(apt-get .*\)/\1/p' "$root/tmp/message")
  [ -n "$named" ] || { echo "make run: its message names no command" && exit 1; }
  as root "export DEBIAN_FRONTEND=noninteractive; ${named//apt-get /apt-get -q -y }" >"$root/tmp/log" 2>&1 || { tail "$root/tmp/log" && exit 1; }
fi
as $user 'cd nexus && make build/deps/test-modules all'
# The demonstration of `make run` is up when its health page answers.
as $user 'set -m; { cd nexus && make run; } >run.log 2>&1 & trap "kill %1" EXIT # with -m: all of the job, not its shell
  for _ in $(seq 100); do
    if { exec 4<>/dev/tcp/127.0.0.1/8000; } 2>/dev/null; then break; fi
    sleep 0.1
  done
  printf "GET /health HTTP/1.0\r\n\r\n" >&4 && head -1 <&4 | grep " 200 " && echo "make run: it answers"'
alone 'cd nexus && make test'
