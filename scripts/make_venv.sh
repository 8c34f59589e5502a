#!/usr/bin/env bash
# Make a virtual environment with pip in it, from whatever Python >= 3.11 the machine has.
#   scripts/make_venv.sh .venv            PYTHON=/path/to/python scripts/make_venv.sh .venv
# Debian and Ubuntu split the standard library: without python3-venv there is no ensurepip. Then, in this order:
# the system's pip fills the environment; apt installs python3-venv where that needs no password; or we say what to type.
set -euo pipefail

venv=${1:?usage: make_venv.sh FOLDER}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 python}; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: expected Python 3.11 or newer, got ${PYTHON:-python3}: $("${PYTHON:-python3}" --version 2>&1 | head -n 1 || true)" >&2
    echo "       Install one (Debian 12+, Ubuntu 24.04+: apt install python3) or name it: make PYTHON=/path/to/python3.12 …" >&2
    exit 1
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
