# Sourced by run.sh and test.sh: sets $python, and installs the pinned requirements into .venv once.
if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
else
    python=.venv/bin/python
    if ! cmp -s requirements.txt .venv/installed.txt; then
        python3 -m venv .venv
        .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/installed.txt
    fi
fi
# glibc would hand every large tensor back to the system after each step; keeping them is faster on a CPU
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456
