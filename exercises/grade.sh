#!/usr/bin/env bash
# Grades the exercises; the last line is `points: X of Y`.
#
#   bash exercises/grade.sh              grades student/, which is made if it does not exist; or this folder itself, if
#                                        it was handed out without the solution (zip.sh)
#   bash exercises/grade.sh 3            grades only exercise 3, and shows pytest's output
#   bash exercises/grade.sh --solution   for staff: prints answers to the questions that no test asks, then grades a
#                                        new copy with the solution filled in
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started with sh
set -euo pipefail
cd "$(dirname "$0")/.."
source setup.sh
folder=student
if [ "${1:-}" = --solution ]; then
    shift
    [ $# -gt 0 ] || cat exercises/solution/answers.md
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    folder=$scratch/solution
    "$python" -m exercises.strip --solution "$folder" > /dev/null
elif [ ! -e "$folder" ] && [ ! -d exercises/solution ]; then
    folder=.
elif [ ! -e "$folder" ]; then
    "$python" -m exercises.strip "$folder"
fi
"$python" exercises/grade.py "$folder" "$@"
