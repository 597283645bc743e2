"""
Whole training runs: scripts in a checkout, `proma_trl.recipes` where the package is installed.

The files lie beside the package, where they are read and launched. `pyproject.toml` puts them into it.
"""
