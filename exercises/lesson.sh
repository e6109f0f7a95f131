#!/usr/bin/env bash
# The lesson: seed, branches, mixture, finetuning and rivals of config/lesson in one table, checked against what is
# expected. 5 minutes on 2 CPU cores; can be stopped and started again.
exec bash "$(dirname "$0")/../run.sh" lesson
