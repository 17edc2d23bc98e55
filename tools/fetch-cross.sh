#!/bin/sh
# Fetches the static libraries of another architecture into a folder, as Debian packages that apt has verified. Nothing is
# installed: usage: tools/fetch-cross.sh aarch64-linux-gnu DIRECTORY
set -eu
case $1 in
  aarch64-linux-gnu) architecture=arm64 ;;
  x86_64-linux-gnu) architecture=amd64 ;;
  *) echo "tools/fetch-cross.sh: for $1 no Debian architecture is known here" >&2 && exit 1 ;;
esac
mkdir -p "$2/apt/lists/partial" "$2/apt/cache/archives/partial"
cd "$2"
apt() {
  apt-get -q -o APT::Architecture=$architecture -o APT::Architectures::=$architecture -o Dir::State="$PWD/apt" \
    -o Dir::State::status=/dev/null -o Dir::Cache="$PWD/apt/cache" -o APT::Sandbox::User=root "$@" >apt/log 2>&1
}
echo "fetching c-ares and OpenSSL for $architecture"
apt update || { tail -5 apt/log >&2 && exit 1; }
apt download libc-ares-dev libssl-dev zlib1g-dev libzstd-dev || { tail -5 apt/log >&2 && exit 1; }
apt download libllhttp-dev || true # Debian 12 has it as source code
for package in *.deb; do dpkg -x "$package" .; done
rm -rf apt ./*.deb
ln -sf /usr/include/doctest usr/include/doctest # headers alone, which this compiler would not find
