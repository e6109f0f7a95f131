#!/usr/bin/env bash
# The lesson: seed, branches, mixture and finetuning of config/lesson, a dense model beside them, one table of all.
# 2 minutes on 2 CPU cores. Can be stopped and started again, like run.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source setup.sh
bash run.sh lesson
$python train.py config/lesson/dense.py
$python eval.py config/lesson/eval.py --model=out/lesson/dense
$python -m study.report --report=out/lesson/report
$python -m study.expected out/lesson
