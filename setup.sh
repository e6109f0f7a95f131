# Sourced by run.sh, test.sh and grade.sh: sets $python, and installs the pinned requirements into .venv once.
fail() { echo "error: $*" >&2; exit 2; }
is_new() { "$1" -c "import sys; sys.exit(sys.version_info < (3, 10))" 2> /dev/null; }  # it runs and is not too old
# false for a folder that was moved or lacks pip (a killed first try, a new system Python): .venv is then made again
is_whole() { "$1/bin/python" -c "import pip" 2> /dev/null && { [ -L "$1" ] || grep -qF "$(pwd -P)/$1" "$1/bin/activate"; }; }
[ -d "${TMPDIR:-/tmp}" ] || unset TMPDIR

if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
    command -v "$python" > /dev/null || fail "PYTHON=$python is not a command; leave PYTHON out and .venv is made"
    is_new "$python" || fail "PYTHON=$python is not Python 3.10 or newer; name another"
    "$python" -c "import numpy, tiktoken, tqdm" 2> /dev/null ||
        fail "PYTHON=$python lacks packages; run $python -m pip install -r requirements.txt"
else
    python=.venv/bin/python
    if ! is_new $python; then
        for newest in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
            ! is_new $newest || break
        done
        is_new $newest || fail "Python 3.10 or newer is needed, not $(python3 --version 2>&1 | head -n 1); install one"
        rm -rf .venv  # of an old Python, or of one that is gone
    elif ! is_whole .venv; then
        newest=$($python -c "import sys; print(sys._base_executable)")
    fi
    if [ -n "${newest:-}" ]; then
        "$newest" -c "import ensurepip, venv" 2> /dev/null ||
            fail "$newest cannot make .venv; on Debian and Ubuntu: sudo apt install python3-venv"
        { "$newest" -m venv .venv && $python -c "import pip"; } 2> /dev/null || "$newest" -m venv --clear .venv
        rm -f .venv/installed.txt
    fi
    if ! cmp -s requirements.txt .venv/installed.txt; then
        $python -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
            fail "pip could not install requirements.txt (see above); run the same command to try again"
        cp requirements.txt .venv/installed.txt
    fi
fi
# glibc would hand every large tensor back to the system after each step; keeping them is faster on a CPU
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456
