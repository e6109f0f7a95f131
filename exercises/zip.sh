#!/usr/bin/env bash
# Writes out/nanobtx-exercises.zip for instructors to hand out: the student's copy with its tests, and nothing solved
# (so without README.md, which shows `mix`). Students unzip it and type `bash exercises/grade.sh`.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started with sh
set -euo pipefail
cd "$(dirname "$0")/.."
source setup.sh
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
copy=$scratch/nanobtx-exercises
"$python" -m exercises.strip "$copy"
mkdir -p out "$copy/docs" "$copy/exercises/tests" "$copy/exercises/entries" "$copy/results/cpu"
cp LICENSE requirements.txt setup.sh run.sh "$copy"
cp docs/lecture.md docs/regime.md docs/teaching.md docs/*.svg docs/open_a_mixture.ipynb "$copy/docs"
cp results/cpu/regime.png "$copy/results/cpu"
cp exercises/{README.md,predictions.md,grade.sh,lesson.sh,leaderboard.sh,grade.py,strip.py,leaderboard.py} "$copy/exercises"
cp exercises/tests/*.py "$copy/exercises/tests"
cp exercises/entries/*.py "$copy/exercises/entries"
cp config/lesson/expected.json "$copy/config/lesson"
"$python" -c "import sys; from exercises.strip import cut_pages; cut_pages(sys.argv[1])" "$copy"
"$python" -m zipfile -c "$scratch/made.zip" "$copy"
mv "$scratch/made.zip" out/nanobtx-exercises.zip
echo "wrote out/nanobtx-exercises.zip; unzip it and run in its folder: bash exercises/grade.sh"
