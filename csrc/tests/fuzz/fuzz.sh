#!/bin/sh
# Fuzzes the .idx reader with libFuzzer under AddressSanitizer and UndefinedBehaviorSanitizer; needs clang.
# Usage: csrc/tests/fuzz/fuzz.sh [seconds] [libFuzzer's options]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
csrc=$(cd "$here/../.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

clang=${CLANGXX:-clang++}
command -v "$clang" >/dev/null || { echo "no $clang: fuzzing needs clang and its libFuzzer (Debian: apt-get install clang)" >&2; exit 1; }
seconds=${1:-60}
[ $# = 0 ] || shift
"$clang" -std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
    -DMEGATRON_7B_FULLY_CHECKED=3 -DMEGATRON_7B_LIBFUZZER -I"$csrc/include" \
    "$here/fuzz_idx.cpp" "$csrc"/src/*.cpp -pthread -o "$build/fuzz_idx"
# New inputs go to a folder of their own: see README.md for how those worth keeping come into the tree.
mkdir -p "$build/new"
[ ! -d /dev/shm ] || export TMPDIR=/dev/shm
"$build/fuzz_idx" -max_total_time="$seconds" -max_len=2048 -timeout=10 -print_final_stats=1 "$@" \
    "${FUZZ_NEW_INPUTS:-$build/new}" "$here/idx_corpus"
