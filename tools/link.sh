#!/bin/sh
# Runs the link command given. A static glibc can't resolve names or services without shared modules at run time, so
# the linker warns of each such function: those inside c-ares and OpenSSL that Nexus never calls are let pass, any other is
# an error. (OpenSSL would load a module, and look up names, for a BIO of its own and for what openssl.cnf says.)
set -u
messages=$(mktemp)
trap 'rm -f "$messages"' EXIT

"$@" 2>"$messages"
status=$?
# Each warning is two lines: "…libcares.a(…): in function `…':" and "(…): warning: Using 'getserv…' in statically linked…".
known='lib(cares|crypto)\.a\(.*: in function'
static='in statically linked applications requires'
grep -vE "$known|$static" "$messages" >&2
if grep -q "$static" "$messages" && grep ': in function' "$messages" | grep -qvE "$known"; then
  echo "link: use c-ares in its place; a static binary must not call this" >&2
  exit 1
fi
exit $status
