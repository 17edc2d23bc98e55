#!/bin/sh
# Runs the link command given. A static glibc can't resolve names or services without shared modules at run time, so
# the linker warns of each such function: those inside c-ares that Nexus never calls are let pass, any other is an error.
set -u
messages=$(mktemp)
trap 'rm -f "$messages"' EXIT

"$@" 2>"$messages"
status=$?
# Each warning is two lines: "…libcares.a(…): in function `…':" and "(…): warning: Using 'getserv…' in statically linked…".
grep -v -e 'libcares\.a(.*: in function' -e "Using 'getservby[a-z_]*' in statically linked" "$messages" >&2
if grep -v "Using 'getservby[a-z_]*'" "$messages" | grep -q 'in statically linked applications requires'; then
  echo "link: use c-ares in its place; a static binary must not call this" >&2
  exit 1
fi
exit $status
