#!/usr/bin/env bash
# Make .venv and install the project into it, editable, with its C++ extension; quick when nothing has changed.
#
#   tools/dev/setup.sh              what training, conversion and the quickstart need
#   tools/dev/setup.sh test dev     and these extras of pyproject.toml
#   PYTHON=/opt/python/bin/python3 tools/dev/setup.sh    with this interpreter
#
# What is missing is said in one line, with the command that installs it; the exit status is then 1.
set -euo pipefail
cd "$(dirname "$0")/../.."

VENV=.venv
STAMPS=$VENV/.stamps
MIN_MINOR=12 # megatron-core 0.19 needs Python 3.12

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# Print the advice for this system: Debian's command, Fedora's or macOS's.
advice() {
    if command -v apt-get >/dev/null; then
        echo "sudo apt-get install $1"
    elif command -v dnf >/dev/null; then
        echo "sudo dnf install $2"
    elif command -v brew >/dev/null; then
        echo "brew install $3"
    else
        echo "install $2 with your system's package manager"
    fi
}

# Can this interpreter make a virtual environment and compile an extension? A pyenv shim may exist and refuse to run,
# and Debian packs venv and the headers apart, so ask by running it. Prints "ok", or what it lacks.
probe() {
    "$1" - "$MIN_MINOR" 2>/dev/null <<'PYTHON' || echo "does not run"
import os, sys, sysconfig
if sys.version_info < (3, int(sys.argv[1])):
    print("is Python %d.%d" % sys.version_info[:2])
elif not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("lacks its headers (Python.h)")
else:
    try:
        import ensurepip, venv
        print("ok")
    except ImportError as error:
        print("lacks the module", error.name)
PYTHON
}

find_python() {
    local candidate answer near=""
    local candidates=(python3.12 python3.13 python3 python3.14)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    [ -n "${PYTHON:-}" ] || candidates+=("${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3
        "$HOME"/.local/share/uv/python/cpython-3.1[2-9]*/bin/python3 /usr/local/bin/python3 /opt/python/*/bin/python3)
    for candidate in "${candidates[@]}"; do
        command -v "$candidate" >/dev/null || continue
        answer=$(probe "$candidate")
        if [ "$answer" = ok ]; then
            command -v "$candidate"
            return
        fi
        case $answer in lacks*) near="$candidate $answer" ;; esac
    done
    [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON ${answer:-is not there}; needed: Python >= 3.$MIN_MINOR with venv and headers"
    [ -z "$near" ] || fail "$near: $(advice "python3-venv python3-dev" python3-devel python@3.12)"
    fail "no Python >= 3.$MIN_MINOR (tried ${candidates[*]:0:4}, pyenv, uv): \
$(advice "python3.12 python3.12-venv python3.12-dev" python3.12-devel python@3.12), or pyenv install 3.12, or PYTHON=/path/to/one"
}

# Export a compiler that really compiles C++17.
find_compiler() {
    local candidate
    for candidate in "${CXX:-}" c++ g++ clang++; do
        if [ -n "$candidate" ] && echo '#include <string_view>' | $candidate -std=c++17 -fsyntax-only -x c++ - 2>/dev/null; then
            export CXX=$candidate
            return
        fi
    done
    fail "no C++17 compiler: $(advice g++ gcc-c++ gcc)"
}

# Print the requirements of some extras, one a line.
requirements_of() {
    $VENV/bin/python - "$@" <<'PYTHON'
import sys, tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*(requirement for extra in sys.argv[1:] for requirement in extras[extra]), sep="\n")
PYTHON
}

# pip install, with the large downloads named: the first time they take minutes.
# --no-compile: byte-compiling all 12,000 modules of torch and transformers takes a minute, and few are ever imported.
install() {
    local log=$VENV/setup.log
    if ! $VENV/bin/python -u -m pip install --disable-pip-version-check --no-compile --progress-bar off "$@" 2>&1 |
        tee "$log" | sed -un 's/^ *Downloading \(.*\) (\([0-9]\{2,\}[0-9.]* [MG]B\))$/setup: downloading \1 (\2)/p
            s/^ *Building editable for .*: started$/setup: compiling the extension/p
            s/^Installing collected packages: .*/setup: unpacking the packages/p'; then
        grep -m 8 -iE '^ *error|error:' "$log" || tail -n 20 "$log"
        fail "pip could not install the project; all that it said is in $log"
    fi
}

# Import what every run imports: it proves the installation, and leaves the byte code of just those modules behind, also
# where the environment forbids writing it (a torch without byte code takes 20 seconds to import instead of 4).
import_once() {
    local output
    output=$(env -u PYTHONDONTWRITEBYTECODE $VENV/bin/python -W ignore - 2>&1 <<'PYTHON'
import fastokens, isal, matplotlib.pyplot, nltk, orjson, psutil, pyarrow.parquet, rich.progress, tokenizers, xxhash, yaml
import torch.distributed.checkpoint, torch.distributed.run, torch.utils.tensorboard
import megatron.core.dist_checkpointing, megatron.core.distributed, megatron.core.optimizer
import megatron.core.models.hybrid.hybrid_model, megatron.core.pipeline_parallel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline
import megatron_7b.data._index
PYTHON
    ) || fail "what was installed does not import: $output"
}

# One hash over contents, so that a fresh checkout's times do not matter.
hash_of() { cat "$@" | cksum | tr ' ' -; }
stamp() { cat "$STAMPS/$1" 2>/dev/null || true; }

# An environment whose interpreter has gone, or that was made elsewhere and moved here, is no use.
made_here() { grep -q "^command = .* $PWD/$VENV\$" $VENV/pyvenv.cfg 2>/dev/null && $VENV/bin/python -c '' 2>/dev/null; }
if [ -d $VENV ] && ! made_here; then
    echo "setup: making $VENV anew (its interpreter or its place has changed)"
    rm -rf $VENV
fi

mapfile -t sources < <(find csrc -path csrc/tests -prune -o -type f -print | LC_ALL=C sort)
requirements=$(hash_of pyproject.toml)
project=$requirements+$(hash_of setup.py megatron_7b/__init__.py "${sources[@]}")
missing=()
for extra in "$@"; do
    [ "$(stamp "extra-$extra")" = "$requirements" ] || missing+=("$extra")
done

if [ "$(stamp project)" != "$project" ]; then
    find_compiler
    if [ ! -d $VENV ]; then
        python=$(find_python)
        free_gb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
        [ "$free_gb" -ge 10 ] || fail "$free_gb GB free in $PWD, and the installation needs about 10 (torch alone takes 5)"
        echo "setup: making $VENV with $python ($("$python" -V)); the first installation takes a few minutes"
        "$python" -m venv "$PWD/$VENV"
    fi
    extras=$(IFS=,; echo "${missing[*]}")
    install --editable ".${extras:+[$extras]}"
    echo "setup: importing it once"
    import_once
elif [ "${#missing[@]}" != 0 ]; then
    mapfile -t wanted < <(requirements_of "${missing[@]}")
    echo "setup: installing what ${missing[*]} needs"
    install "${wanted[@]}"
fi

mkdir -p $STAMPS
echo "$project" >$STAMPS/project
for extra in "${missing[@]}"; do
    echo "$requirements" >"$STAMPS/extra-$extra"
done
