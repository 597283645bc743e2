# Sourced by the scripts that make environments: `make_environment` and `install_torch`, from the variable `venv`, the
# directory. PYTHON=... chooses the interpreter.

python=${PYTHON:-python3}
torch_version=2.13.0
uv_version=0.13.8

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

make_environment() {
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "install: '$python' is missing or older than Python 3.11; name another one: make PYTHON=/path/to/python3 ..." >&2
        exit 1
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "install: '$python' cannot make virtual environments; install its venv package (Debian: python3-venv)" >&2
        exit 1
    fi
    "$python" -m venv "$venv"
}

# PyTorch comes first: on Linux a plain requirement pulls gigabytes of CUDA packages, whether there is a GPU or not.
install_torch() {
    if [[ $(uname) != Linux ]] || command -v nvidia-smi >/dev/null; then
        pip install "torch==$torch_version"
        return
    fi
    # Where pip's own configuration knows a CPU build, this is all it takes.
    if pip install "torch==$torch_version+cpu" 2>/dev/null; then
        return
    fi
    # Otherwise uv, which knows where PyTorch keeps its CPU builds.
    if pip install "uv==$uv_version" &&
        "$venv/bin/uv" pip install --python "$venv/bin/python" --torch-backend=cpu "torch==$torch_version"; then
        return
    fi
    echo "install: no CPU build of PyTorch $torch_version is within reach, taking the default build with CUDA packages." >&2
    echo "install: to avoid that, give pip a place with CPU builds (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL)." >&2
    pip install "torch==$torch_version"
}
