"""
Step time of PROMATrainer beside GRPOTrainer's: one optimizer step without generation.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --hidden 576 --vocabulary 49152 --lengths 256 --output step_time.json

Both trainers live in one process and take turns; figures are medians of each and the median ratio of the pairs.
Neither samples: completions are random tokens, so that a step is forward and backward passes of every microbatch,
gradient clipping and the optimizer. With `--projection none` the hooks are out of the way and the ratio is the noise.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from proma_trl import PROMAConfig, PROMATrainer


def make_trainer(trainer_class, config_class, arguments, length, folder, prepare=True, **kwargs):
    """A trainer of a random Qwen3 with a tied embedding, ready for steps if `prepare`, else for `train()`."""
    vocabulary = {f"token{i}": i for i in range(8)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="token2")),
        pad_token="token0",
        eos_token="token1",
        unk_token="token2",
    )
    torch.manual_seed(0)
    heads = arguments.hidden // 64
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=arguments.vocabulary,
            hidden_size=arguments.hidden,
            intermediate_size=3 * arguments.hidden,
            num_hidden_layers=arguments.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
            head_dim=64,
            tie_word_embeddings=True,
        )
    )
    args = config_class(
        folder,
        per_device_train_batch_size=arguments.sequences,
        gradient_accumulation_steps=arguments.microbatches,
        num_generations=arguments.sequences,
        max_completion_length=length,
        gradient_checkpointing=arguments.checkpointing,
        bf16=arguments.bf16,
        use_cpu=arguments.device == "cpu",
        learning_rate=1e-5,
        report_to="none",
        **kwargs,
    )
    trainer = trainer_class(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args,
        Dataset.from_dict({"prompt": ["token3"] * 8}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=arguments.lora, target_modules="all-linear") if arguments.lora else None,
    )
    if not prepare:
        return trainer
    trainer.create_optimizer()
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = arguments.microbatches
    trainer.model.train()
    return trainer


def make_inputs(arguments, length, seed):
    """A microbatch as TRL's loss takes it: a prompt, and a completion that ends anywhere in its second half."""
    generator = torch.Generator().manual_seed(seed)
    k, prompt = arguments.sequences, max(1, round(arguments.prompt * length))
    completion = length - prompt
    ids = torch.randint(3, arguments.vocabulary, (k, length), generator=generator)
    ends = torch.randint(completion // 2, completion + 1, (k, 1), generator=generator)
    mask = (torch.arange(completion) < ends).long()
    inputs = {
        "prompt_ids": ids[:, :prompt],
        "prompt_mask": torch.ones(k, prompt, dtype=torch.long),
        "completion_ids": ids[:, prompt:],
        "completion_mask": mask,
        "advantages": torch.randn(k, generator=generator),
        "num_items_in_batch": mask.sum() * arguments.microbatches,
    }
    return {name: value.to(arguments.device) for name, value in inputs.items()}


def step(trainer, microbatches, device):
    """Seconds of one optimizer step, and the peak of memory on CUDA in bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for inputs in microbatches:
        loss = trainer.compute_loss(trainer.model, inputs)
        trainer.accelerator.backward(loss)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    trainer._metrics["train"].clear()
    return elapsed, torch.cuda.max_memory_allocated() if device == "cuda" else 0


def make_parser() -> argparse.ArgumentParser:
    """The options of this benchmark and of `memory.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512], help="tokens a sequence, T")
    parser.add_argument("--prompt", type=float, default=0.5, help="part of the tokens that is the prompt's")
    parser.add_argument("--sequences", type=int, default=8, help="sequences a microbatch, k")
    parser.add_argument("--microbatches", type=int, default=4, help="microbatches an optimizer step")
    parser.add_argument("--projection", default="iterative", choices=["iterative", "exact", "none"])
    parser.add_argument("--budget", type=float, default=PROMAConfig.projection_memory_budget, help="GiB")
    parser.add_argument(
        "--lora", type=int, help="rank of LoRA adapters on all linear layers; all parameters without it"
    )
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def write(arguments: argparse.Namespace, results: list[dict]) -> None:
    """Write settings, environment and results to `arguments.output`, if it is set."""
    if arguments.output is not None:
        settings = {key: value for key, value in vars(arguments).items() if key != "output"}
        environment = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        arguments.output.write_text(
            json.dumps({"settings": settings, "environment": environment, "results": results}, indent=2) + "\n"
        )


def main() -> None:
    arguments = make_parser().parse_args()
    results = []
    print(f"{'T':>6} {'GRPO s':>9} {'PROMA s':>9} {'ratio':>7} {'GRPO GiB':>9} {'PROMA GiB':>9}")
    for length in arguments.lengths:
        with tempfile.TemporaryDirectory() as folder:
            grpo = make_trainer(GRPOTrainer, GRPOConfig, arguments, length, folder)
            proma = make_trainer(
                PROMATrainer,
                PROMAConfig,
                arguments,
                length,
                folder,
                projection=arguments.projection,
                projection_memory_budget=arguments.budget,
            )
        microbatches = [make_inputs(arguments, length, seed) for seed in range(arguments.microbatches)]
        times, peaks = {"grpo": [], "proma": []}, {"grpo": 0, "proma": 0}
        for repeat in range(arguments.repeats + 1):
            for name, trainer in (("grpo", grpo), ("proma", proma)):
                elapsed, peak = step(trainer, microbatches, arguments.device)
                if repeat > 0:  # the first step warms up
                    times[name].append(elapsed)
                    peaks[name] = max(peaks[name], peak)
        ratio = statistics.median(p / g for p, g in zip(times["proma"], times["grpo"], strict=True))
        result = {
            "length": length,
            "grpo_seconds": statistics.median(times["grpo"]),
            "proma_seconds": statistics.median(times["proma"]),
            "ratio": ratio,
            "grpo_peak_bytes": peaks["grpo"],
            "proma_peak_bytes": peaks["proma"],
        }
        results.append(result)
        print(
            f"{length:>6} {result['grpo_seconds']:>9.3f} {result['proma_seconds']:>9.3f} {ratio:>7.3f} "
            f"{peaks['grpo'] / 2**30:>9.2f} {peaks['proma'] / 2**30:>9.2f}",
            flush=True,
        )
    write(arguments, results)


if __name__ == "__main__":
    main()
