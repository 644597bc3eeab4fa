#!/usr/bin/env bash
# Make the virtual environment .venv with what is missing in it; a second run finds nothing to do.
#
#   bash scripts/setup.sh          what the scripts and notebooks need (requirements.txt)
#   bash scripts/setup.sh test     the test tools as well (tests/requirements.txt)
#
# PYTHON=python3.12 chooses the interpreter (3.10 or newer; default python3).
# VENV=DIR puts the environment elsewhere.
# SYSTEM_PACKAGES=1 lets it see packages that the machine already has, such as a vendor's build of torch.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
case "${1:-}" in
    "") wanted=requirements.txt ;;
    test) wanted=tests/requirements.txt ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}

fail() {
    echo "setup: $1" >&2
    exit 2
}
command -v "$python" >/dev/null || fail "there is no $python; name a Python with PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old; name Python 3.10 or newer with PYTHON=python3.12"

if [ ! -x "$venv/bin/python" ]; then
    echo "setup: making $venv"
    "$python" -m venv ${SYSTEM_PACKAGES:+--system-site-packages} "$venv" ||
        fail "could not make $venv; on Debian and Ubuntu: apt-get install python3-venv"
fi

# The digest of the lists that were installed last tells whether anything can be missing.
digest=$(cat requirements.txt tests/requirements.txt | cksum)
stamp="$venv/.installed-${wanted//\//-}"
if [ "$(cat "$stamp" 2>/dev/null)" != "$digest" ]; then
    echo "setup: installing $wanted into $venv (torch is large: a few minutes on a slow line)"
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet -r "$wanted" ||
        fail "pip could not install $wanted; the reason stands above. Run this again to go on"
    echo "$digest" >"$stamp"
fi
