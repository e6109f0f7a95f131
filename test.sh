#!/usr/bin/env bash
# Runs the tests, in at most 4 minutes on 2 CPU cores. Arguments go to pytest: bash test.sh -k mix
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started with sh
set -euo pipefail
cd "$(dirname "$0")"
source setup.sh
if [ $# -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi
# all of them, as two halves side by side, since a test uses one core
printed=$(mktemp)
trap 'rm -f "$printed"' EXIT
"$python" -m pytest tests/common tests/study > "$printed" 2>&1 & other=$!
failed=0
"$python" -m pytest tests/data tests/test_*.py || failed=1
wait $other || failed=1
cat "$printed"
exit $failed
