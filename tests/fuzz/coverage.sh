#!/bin/bash
# Measures which lines of the parsers the hostile rows and the fuzz corpora reach: tests/fuzz/coverage.sh DIRECTORY CXX
# INCLUDES. Compiles those tests with clang's source-based coverage, runs them, and prints a table.
set -euo pipefail
cd "$(dirname "$0")/../.."
directory=$1/coverage cxx=$2 includes=$3
tool() { command -v "$1" || command -v "$1-14" || ls /usr/lib/llvm-*/bin/"$1" 2>/dev/null | tail -1; }
profdata=$(tool llvm-profdata) cov=$(tool llvm-cov)
mkdir -p "$directory"
objects=()
for source in tests/main_test.cpp tests/fuzz_corpus_test.cpp tests/hostile_*_test.cpp tests/hostile/gateway.cpp; do
  object=$directory/$(basename "$source" .cpp).o
  objects+=("$object")
  echo "compiling $source"
  # shellcheck disable=SC2086
  "$cxx" -std=c++20 -O0 -DSIMDJSON_DEVELOPMENT_CHECKS=0 -fprofile-instr-generate -fcoverage-mapping $includes -c "$source" -o "$object"
done
"$cxx" -fprofile-instr-generate -pthread "${objects[@]}" build/deps/*.o -o "$directory/tests"
LLVM_PROFILE_FILE=$directory/raw "$directory/tests"
"$profdata" merge -sparse "$directory/raw" -o "$directory/merged"
"$cov" report "$directory/tests" -instr-profile="$directory/merged" -show-region-summary=false \
  nexus/{config,http,api}/*.h nexus/base/simd.h nexus/metrics/{labels,exposition}.h nexus/server/worker.h nexus/proxy/exchange.h
