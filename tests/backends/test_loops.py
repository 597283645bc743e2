"""Loops without a trainer on two ranks, and what they must say of themselves."""

import os
import subprocess
import sys

import pytest
from support.harness import make_model
from support.launches import (
    RANKS,
    SCRIPTS,
)

from proma_trl import PROMA, REINFORCE, ProjectedAccumulation
from proma_trl.accumulation.accumulators import KeptAccumulator
from proma_trl.backends.deepspeed import ZeroTwoThreeBackend


@pytest.mark.parametrize("mark", ["ds_id", "param_idx_in_group"])
def test_deepspeed_needs_to_know_where_an_accumulation_ends(mark):
    model = make_model()
    accumulation = ProjectedAccumulation(model, microbatch_size=2)
    setattr(next(model.parameters()), mark, 0)
    with pytest.raises(RuntimeError, match="needs the `accelerator`"), accumulation.capture():
        pass


def test_a_global_scope_needs_to_know_where_an_accumulation_ends():
    with pytest.raises(ValueError, match=r"`scope=\"global\"` needs the `accelerator`"):
        ProjectedAccumulation(make_model(), microbatch_size=2, scope="global")
    with pytest.raises(ValueError, match="`scope` must be one of 'local', 'global', got 'node'"):
        ProjectedAccumulation(make_model(), microbatch_size=2, scope="node")


@pytest.mark.parametrize(
    ("rule", "target", "keeps"),
    [
        (REINFORCE(), "microbatch", False),
        (REINFORCE(), "accumulated", True),
        (PROMA(), "microbatch", True),
    ],
)
def test_intra_alone_keeps_nothing_where_gradients_are_sharded(rule, target, keeps, monkeypatch):
    """Under ZeRO-2 and ZeRO-3, an accumulator would take as much memory as all trainable parameters."""
    model = make_model()
    monkeypatch.setattr(
        "proma_trl.accumulation.accumulation.backend_for", lambda model, accelerator: ZeroTwoThreeBackend(model)
    )
    accumulation = ProjectedAccumulation(model, rule, microbatch_size=2, intra_dim=3, intra_target=target)
    with accumulation.capture():
        pass
    assert isinstance(accumulation._accumulator, KeptAccumulator) == keeps


@pytest.mark.slow
def test_loops_without_a_trainer():
    """DDP and FSDP2 by hand; W ranks in a global scope take the step of one rank with all their sequences."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    run = subprocess.run(
        [*command, str(SCRIPTS / "loops.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-9000:]
    assert "all held" in run.stdout
