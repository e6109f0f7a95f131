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
"$python" - "$copy" << 'END'
# Pages as students see them: without the part for staff, and links to what is not in the zip become plain words.
import pathlib, re, sys

def kept(match):
    words, target = match[1], match[2].partition("#")[0]
    return match[0] if ":" in target or (page.parent / target).exists() else words

for page in pathlib.Path(sys.argv[1]).rglob("*.md"):
    text = page.read_text(encoding="utf-8").partition("\n## For staff")[0]
    page.write_text(re.sub(r"(?<!!)\[([^][]*)\]\(([^()\s]+)\)", kept, text).rstrip() + "\n", encoding="utf-8")
END
"$python" -m zipfile -c "$scratch/made.zip" "$copy"
mv "$scratch/made.zip" out/nanobtx-exercises.zip
echo "wrote out/nanobtx-exercises.zip; unzip it and run in its folder: bash exercises/grade.sh"
