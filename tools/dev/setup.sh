#!/usr/bin/env bash
# Make .venv and install the project into it, editable, with its C++ extension; quick when nothing has changed.
#
#   tools/dev/setup.sh              what training, conversion and the quickstart need
#   tools/dev/setup.sh test dev     and these extras of pyproject.toml
#   PYTHON=/opt/python/bin/python3 tools/dev/setup.sh    with this interpreter
#
#   LOCK=none tools/dev/setup.sh    the newest versions that pyproject.toml allows, not those of requirements.lock
#   INSTALLER=uv tools/dev/setup.sh  with uv instead of pip, which is faster
#
# What is missing is said in one line, with the command that installs it; the exit status is then 1. Interrupted at any
# moment, the same command continues: pip's cache has what was downloaded.
set -euo pipefail
cd "$(dirname "$0")/../.."

VENV=.venv
STAMPS=$VENV/.stamps
LOCK=${LOCK:-requirements.lock}
MIN_MINOR=12 # megatron-core 0.19 needs Python 3.12

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

NUM_STEPS=5 # making .venv; downloading, compiling, unpacking, which install.py counts; importing
step() { printf 'setup: [%d/%d] %s\n' "$1" $NUM_STEPS "$2"; }

interrupted() {
    printf '\nsetup: interrupted after %d:%02d; the same command continues, and keeps what is downloaded\n' \
        $((SECONDS / 60)) $((SECONDS % 60)) >&2
    exit 130
}
trap interrupted INT TERM

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

# Install requirements into .venv with the versions of the lock, saying how far it is.
# --no-compile: byte-compiling all 12,000 modules of torch and transformers takes a minute, and few are ever imported.
install() {
    local log=$VENV/setup.log constraints=() code=0
    [ "$LOCK" = none ] || constraints=(--constraint "$LOCK")
    # pip unpacks 3 GB of wheels into its temporary folder, and /tmp is often small.
    export TMPDIR=$PWD/$VENV/tmp
    mkdir -p "$TMPDIR"
    if [ "${INSTALLER:-pip}" = uv ]; then
        uv pip install --python $VENV/bin/python "${constraints[@]}" "$@" || code=$?
    else
        $VENV/bin/python tools/dev/install.py --extras "${missing[*]}" --steps "$install_steps" --log "$log" -- pip install \
            --disable-pip-version-check --no-compile --progress-bar "$progress_bar" "${constraints[@]}" "$@" || code=$?
    fi
    rm -rf "$TMPDIR"
    unset TMPDIR
    [ $code = 0 ] && return
    [ "${INSTALLER:-pip}" = uv ] || grep -m 8 -iE '^ *error|error:' "$log" || tail -n 20 "$log"
    if grep -q "No space left" "$log" 2>/dev/null; then
        fail "no space left: free some in $PWD (5 GB) and for pip's cache (3 GB; PIP_CACHE_DIR=FOLDER moves it, \
PIP_NO_CACHE_DIR=1 does without), then the same command continues"
    fi
    fail "${INSTALLER:-pip} could not install the project; all that it said is in $log. The same command tries again and \
keeps what is downloaded; LOCK=none takes the newest versions that pyproject.toml allows"
}

# Older versions of pip do not say how far a download is.
update_pip() {
    progress_bar=off
    if $VENV/bin/python -m pip install --help | grep -w raw >/dev/null; then
        progress_bar=raw
        return
    fi
    local pinned=pip
    [ "$LOCK" = none ] || pinned=$(grep -o '^pip==[^ ]*' "$LOCK")
    if $VENV/bin/python -m pip install --quiet --disable-pip-version-check "$pinned" >$VENV/pip.log 2>&1; then
        progress_bar=raw
    fi
}

# Import what every run imports: it proves the installation, and leaves the byte code of just those modules, also
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
    echo "setup: making $VENV anew (it is half made, or its interpreter or its place has changed)"
    rm -rf $VENV
fi

make_venv() {
    local free_gb log
    log=$(mktemp)
    free_gb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
    [ "$free_gb" -ge 10 ] ||
        fail "$free_gb GB free in $PWD, and the installation needs about 10 (6 stay; torch's CUDA libraries are most of it)"
    "$python" -m venv "$PWD/$VENV" >"$log" 2>&1 || fail "$python -m venv failed: $(tail -n 3 "$log")"
    rm -f "$log"
}

mapfile -t sources < <(find csrc -path csrc/tests -prune -o -type f -print | LC_ALL=C sort)
requirements=$(hash_of pyproject.toml requirements.lock)
project=$requirements+$(hash_of setup.py megatron_7b/__init__.py "${sources[@]}")
missing=()
for extra in "$@"; do
    [ "$(stamp "extra-$extra")" = "$requirements" ] || missing+=("$extra")
done
install_steps=0/0

if [ "$(stamp project)" != "$project" ]; then
    find_compiler
    # Interrupted before pip was in it, an environment is made anew.
    if [ -d $VENV ] && ! $VENV/bin/python -m pip --version >/dev/null 2>&1; then rm -rf $VENV; fi
    if [ -d $VENV ]; then
        step 1 "updating $VENV (compiler: $CXX)"
    else
        python=$(find_python)
        step 1 "making $VENV with $python ($("$python" -V)); compiler: $CXX"
        make_venv
    fi
    update_pip
    joined=$(IFS=,; echo "${missing[*]}")
    install_steps=2/$NUM_STEPS
    install --editable ".${joined:+[$joined]}"
    step 5 "importing everything once, which proves it and makes later starts fast"
    import_once
    printf 'setup: done after %d:%02d\n' $((SECONDS / 60)) $((SECONDS % 60))
elif [ "${#missing[@]}" != 0 ]; then
    mapfile -t wanted < <(requirements_of "${missing[@]}")
    echo "setup: installing what ${missing[*]} needs"
    update_pip
    install "${wanted[@]}"
fi

mkdir -p $STAMPS
echo "$project" >$STAMPS/project
for extra in "${missing[@]}"; do
    echo "$requirements" >"$STAMPS/extra-$extra"
done
