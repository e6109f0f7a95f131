#!/usr/bin/env bash
# The lesson: seed, branches, mixture, finetuning and rivals of config/lesson in one table, checked against the expected
# results. Takes 5 minutes on 2 CPU cores; you can stop it and start it again.
exec bash "$(dirname "$0")/../run.sh" lesson
