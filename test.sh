#!/usr/bin/env bash
# Runs the tests, at most 3 minutes on 2 CPU cores; arguments go to pytest: bash test.sh -k mix
set -euo pipefail
cd "$(dirname "$0")"
source setup.sh
$python -m pytest "$@"
