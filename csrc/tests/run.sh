#!/bin/sh
# Compiles and runs the native tests under AddressSanitizer and UndefinedBehaviorSanitizer.
# Usage: csrc/tests/run.sh [part of a test's name]
set -eu
csrc=$(cd "$(dirname "$0")/.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
set -- "${1:-}"

compile() {
    "${CXX:-c++}" -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
        -Wall -Wextra -Wshadow -Wconversion -Wsign-conversion -Werror -I"$csrc/include" -c "$1" -o "$2"
}

# Two at a time: the machines that build this have at least two cores.
number=0
for source in "$csrc"/src/*.cpp "$csrc"/tests/*.cpp; do
    number=$((number + 1))
    compile "$source" "$build/$number.o" &
    if [ $((number % 2)) -eq 0 ]; then
        wait
    fi
done
wait
"${CXX:-c++}" -fsanitize=address,undefined -pthread "$build"/*.o -o "$build/native_tests"
if [ -n "$1" ]; then
    "$build/native_tests" "$1"
else
    "$build/native_tests"
fi
