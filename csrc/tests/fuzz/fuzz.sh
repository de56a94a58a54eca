#!/bin/sh
# Fuzzes a reader with libFuzzer under AddressSanitizer and UndefinedBehaviorSanitizer; needs clang.
# Usage: csrc/tests/fuzz/fuzz.sh idx|jsonl [seconds] [libFuzzer's options]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
csrc=$(cd "$here/../.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

clang=${CLANGXX:-clang++}
command -v "$clang" >/dev/null || { echo "no $clang: fuzzing needs clang and its libFuzzer (Debian: apt-get install clang)" >&2; exit 1; }
case ${1:-} in
    idx) inputs=$here/idx_corpus ;;
    jsonl) inputs=$csrc/../tests/fuzz/jsonl_corpus ;;
    *) echo "usage: csrc/tests/fuzz/fuzz.sh idx|jsonl [seconds] [libFuzzer's options]" >&2; exit 2 ;;
esac
target=fuzz_$1
shift
seconds=${1:-60}
[ $# = 0 ] || shift
"$clang" -std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
    -DMEGATRON_7B_FULLY_CHECKED=3 -DMEGATRON_7B_LIBFUZZER -I"$csrc/include" \
    "$here/$target.cpp" "$csrc"/src/*.cpp -pthread -o "$build/$target"
# New inputs go to a folder of their own: see README.md for how those worth keeping come into the tree.
mkdir -p "$build/new"
[ ! -d /dev/shm ] || export TMPDIR=/dev/shm
"$build/$target" -max_total_time="$seconds" -max_len=2048 -timeout=10 -print_final_stats=1 "$@" \
    "${FUZZ_NEW_INPUTS:-$build/new}" "$inputs"
