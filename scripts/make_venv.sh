#!/usr/bin/env bash
# Makes a virtual environment with pip, from an installed Python >= 3.11.
#   scripts/make_venv.sh .venv            PYTHON=/path/to/python scripts/make_venv.sh .venv
#   scripts/make_venv.sh --newest .venv   the newest Python of PATH and of pyenv, from 3.12 to 3.14
# Exits with 3 if there is no such Python.
# Debian and Ubuntu split the standard library: without python3-venv there is no ensurepip. Then, in this order:
# the system's pip fills the environment; apt installs python3-venv if that needs no password; or an error says what to type.
set -euo pipefail

oldest=3.11
candidates="python3 python3.14 python3.13 python3.12 python3.11 python"
if [ "${1:-}" = --newest ]; then
    shift
    oldest=3.12
    candidates=
    for version in 3.14 3.13 3.12; do
        candidates+=" python$version $(echo "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python)"
    done
fi
usage="usage: scripts/make_venv.sh [--newest] FOLDER"
case "${1:-}" in
    --help | -h) echo "$usage"; exit 0 ;;
    "" | -*) echo "error: expected a folder, got '${1:-}'; $usage" >&2; exit 2 ;;
esac
venv=$1

# Runs it, because a shim of pyenv may name a missing Python.
is_new_enough() { "$1" -c "import sys; sys.exit(sys.version_info < (3, ${oldest#3.}))" >/dev/null 2>&1; }

find_python() {
    local candidate first
    for candidate in ${PYTHON:-$candidates}; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    first=${PYTHON:-python3}
    if command -v "$first" >/dev/null; then
        echo "error: expected Python $oldest or newer, got $first: $("$first" --version 2>&1 | head -n 1 || true)" >&2
    else
        echo "error: expected Python $oldest or newer, got $first, which is not a program" >&2
    fi
    echo "       Install one (Debian 12+, Ubuntu 24.04+: apt install python3; pyenv: pyenv install 3.13)" >&2
    echo "       or name it: make PYTHON=/path/to/python3.13 …" >&2
    exit 3
}

has_pip() { "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

fill_from_system_pip() { "$python" -m pip --python "$venv/bin/python" install --quiet pip >/dev/null 2>&1; }

apt_install() {
    local become=()
    [ "$(id -u)" = 0 ] || become=(sudo -n)
    command -v apt-get >/dev/null && "${become[@]}" true 2>/dev/null || return 1
    echo "installing $1 with apt-get"
    "${become[@]}" apt-get update -qq && "${become[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$1" >/dev/null
}

python=$(find_python)
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
echo "making $venv with $python (Python $version)"

if "$python" -c 'import ensurepip' >/dev/null 2>&1; then
    "$python" -m venv "$venv"
    exit
fi

"$python" -m venv --without-pip "$venv" 2>/dev/null && fill_from_system_pip && has_pip && exit

rm -rf "$venv"
case $python in /usr/bin/python3) package=python3-venv ;; *) package=python$version-venv ;; esac
if apt_install "$package" && "$python" -m venv "$venv"; then
    exit
fi
rm -rf "$venv"
echo "error: expected Python's venv module with ensurepip, got a Python without it." >&2
echo "       Run: sudo apt install $package   and then make again." >&2
exit 1
