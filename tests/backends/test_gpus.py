"""Two GPUs: NCCL, and Accelerate's FSDP2."""

import pytest
import torch
from support.launches import (
    CASES,
    RANKS,
    accelerate_config,
    assert_the_definitions,
    marked,
    run_cases,
)

GPU_BACKENDS = ["multi_gpu", "zero1", "zero2", "zero3", "fsdp2"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two CUDA devices: NCCL, and Accelerate's FSDP2")
@pytest.mark.parametrize("backend", marked(GPU_BACKENDS))
def test_the_step_is_the_definitions_on_gpus(backend, tmp_path):
    config = accelerate_config(backend, tmp_path, use_cpu=False)
    cases = {name: {**case, "args": {**case["args"], "use_cpu": False, "tf32": False}} for name, case in CASES.items()}
    for name, folder in run_cases(tmp_path, config, cases).items():
        method = CASES[name]["args"].get("projection", "iterative")
        assert_the_definitions(CASES[name], folder, tolerance=1e-4, method=method)
