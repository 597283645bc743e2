"""What the tests of several ranks share."""

import pytest
from support.launches import (
    ALONGSIDE,
    BACKENDS,
    CASES,
    accelerate_config,
    run_cases,
)


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Trains all cases of a backend in one launch, when the first of them is asked for."""
    done = {}

    def run(backend):
        if backend not in done:
            name, options = BACKENDS[backend]
            folder = tmp_path_factory.mktemp(backend)
            cases = {name: {**case, **options} for name, case in (CASES | ALONGSIDE.get(backend, {})).items()}
            done[backend] = run_cases(folder, accelerate_config(name, folder), cases)
        return done[backend]

    return run
