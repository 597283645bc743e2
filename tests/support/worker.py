"""
What each rank runs: trains tiny policies for a step, case by case, and leaves behind what it saw.

    accelerate launch --config_file ... worker.py cases.json output_dir

A case is `{"name": ..., "model": folder, "args": {...}}`, and optionally `"lora": true`, `"fsdp": true`, `"resume"`
with a checkpoint, whose path may be relative to the output directory, `"prompts"` with their number, `"dies_at"`
with the step that rank 1 does not survive, and `"unscored"` with the ranks that have no scored token in their second
microbatch.

Rank r leaves `<name>/inputs_<r>.pt`, the microbatches that its loss was given, in order; all together leave the
trained policy, `<name>/trained`; and rank 0 the adapter as it was before training, `<name>/adapter.pt`.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from proma_trl import PROMATrainer
from support.harness import lora_config, make_args, make_trainer


class RecordingTrainer(PROMATrainer):
    """Keeps the microbatches that its loss is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.microbatches = []
        self.unscored = ()

    def _compute_loss(self, model, inputs):
        if self.accelerator.process_index in self.unscored and len(self.microbatches) == 1:
            inputs = {**inputs, "completion_mask": torch.zeros_like(inputs["completion_mask"])}
        kept = {name: value.cpu().clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        self.microbatches.append({**kept, "boundary": torch.tensor(self.accelerator.sync_gradients)})
        return super()._compute_loss(model, inputs)


class Death(TrainerCallback):
    """Kills rank 1 as a machine's failure would, in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def run(case: dict, output_dir: Path) -> None:
    """Trains one case."""
    folder = output_dir / case["name"]
    folder.mkdir(parents=True, exist_ok=True)
    args = make_args(folder / "run", **case.get("args", {}))
    model = case["model"]
    if case.get("fsdp"):
        # Accelerate has no FSDP on a CPU, but transformers shards with FSDP2 on any device as it loads
        shards = DistributedConfig(fsdp_size=args.world_size)
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, distributed_config=shards)
        args.model_init_kwargs = None
    callbacks = [Death(case["dies_at"])] if "dies_at" in case else None
    trainer = make_trainer(
        folder / "run",
        model,
        RecordingTrainer,
        args=args,
        peft_config=lora_config(Path(case["model"]).name) if case.get("lora") else None,
        callbacks=callbacks,
        prompts=case.get("prompts", 64),
    )
    trainer.unscored = case.get("unscored", ())
    if case.get("lora") and trainer.accelerator.is_main_process:
        adapter = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        torch.save(adapter, folder / "adapter.pt")
    trainer.train(resume_from_checkpoint=str(output_dir / case["resume"]) if "resume" in case else None)
    torch.save(trainer.microbatches, folder / f"inputs_{trainer.accelerator.process_index}.pt")
    trainer.save_model(str(folder / "trained"))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    AcceleratorState._reset_state()
    GradientState._reset_state()


def main(cases_file: str, output_dir: str) -> None:
    """Trains every case in turn."""
    torch.set_num_threads(1)
    gc.freeze()  # trainers collect garbage when they begin: they need not search the objects of what was imported
    for case in json.loads(Path(cases_file).read_text()):
        run(case, Path(output_dir))
    # Gloo's threads end with the last reference to a group, and need a living interpreter to let go of its tensors
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
