#!/usr/bin/env bash
# Builds the sdist, and the wheel from it, in dist/; checks both; installs the wheel where nothing else is, and uses it there.
#   usage: scripts/check_package.sh [--demo]      (--demo runs the demo, too; PYTHON=... chooses the interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."

source scripts/environment.sh
tools=.venv-package/tools
user=.venv-package/user
rm -rf dist build "$user"

venv=$tools
[[ -x $tools/bin/python ]] || make_environment
pip install --quiet --no-deps --requirement requirements/tested_package.txt
"$tools/bin/python" -m build --no-isolation
rm -rf build proma_trl.egg-info # Python would read requirements from there, in the place of those that are installed
"$tools/bin/python" -m twine check --strict dist/*

venv=$user
make_environment
install_torch
# The tested versions, so that what is new on the registry does not decide whether the package is sound.
pip install --quiet --constraint requirements/tested.txt "$(ls dist/*.whl)[figures]"
checkout=$PWD
cd "$user" # not in the checkout, where Python would find the sources
"$checkout/$user/bin/python" "$checkout/scripts/try_package.py" "$checkout" "$@"
