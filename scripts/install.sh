#!/usr/bin/env bash
# Makes a virtual environment with a pin set and this project in it, editable.
#   usage: scripts/install.sh [directory [pin set]]      (default .venv requirements/tested.txt; PYTHON=... chooses the
#                                                         interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
pins=${2:-requirements/tested.txt}
source scripts/environment.sh

make_environment
install_torch
pip install --requirement "$pins"
# The pin set is complete: no dependencies to resolve, and setuptools is already there to build with.
pip install --no-deps --no-build-isolation --editable .
