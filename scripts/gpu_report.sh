#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: runs the tests and benchmarks that need one, and writes one report.
#   usage: scripts/gpu_report.sh [options of benchmarks/gpu_report.py]      (PYTHON=... chooses the interpreter)
# Without PYTHON it takes the repository's environment, .venv, and makes it where it is missing.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
if [[ -n ${PYTHON:-} ]]; then
    python=$PYTHON
else
    python=$root/.venv/bin/python
    [[ -x $python ]] || bash "$root/scripts/install.sh" .venv
fi

if ! "$python" -c 'import accelerate, proma_trl, pytest'; then
    echo "gpu_report: '$python' cannot import all that the report needs. Install it:" >&2
    echo "    '$python' -m pip install -e '$root[dev,deepspeed]'" >&2
    exit 1
fi
if [[ " $* " != *" --dry-run "* ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    version=$("$python" -c 'import torch; print(torch.__version__)')
    echo "gpu_report: PyTorch $version of '$python' finds no CUDA device. If nvidia-smi shows one, install a CUDA build:" >&2
    echo "    '$python' -m pip install --force-reinstall torch==${version%%+*}" >&2
    echo "gpu_report: without a GPU, --dry-run tries the report itself." >&2
    exit 1
fi

exec "$python" "$root/benchmarks/gpu_report.py" "$@"
