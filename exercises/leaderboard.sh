#!/usr/bin/env bash
# The leaderboard: runs an entry with three random seeds and compares it with the best one so far. You can stop it and
# start it again.
#
#   bash exercises/leaderboard.sh exercises/entries/ours.py [--seeds=1,2,3]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started with sh
set -euo pipefail
cd "$(dirname "$0")/.."
source setup.sh
"$python" -m data.prepare config/lesson/data.py --domains=code,math,wiki > /dev/null
exec "$python" -m exercises.leaderboard "$@"
