"""What a run reports beside the trainer's own metrics: greedy accuracy on held-out problems, a file of all metrics."""

import json
import math
from pathlib import Path

import torch
from datasets import Dataset
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer
from trl.trainer.utils import pad

from ..trainer.model_card import ACCURACY
from ..trainer.trl_internals import unwrapped_for_generation
from .data import tokenize_prompts
from .rewards import accuracy_reward


class GreedyEvaluation(TrainerCallback):
    """
    Measures how many held-out problems the policy solves with greedy decoding: before training, every few steps, and
    after the last step. Logged as `eval_accuracy`, between 0 and 1.

    Training is not affected: no random numbers are drawn and none of the trainer's metrics are consumed. Completions
    have at most the trainer's `max_completion_length` tokens, and a process decodes `per_device_eval_batch_size` at a
    time.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer to which the callback will be added.
        dataset ([`~datasets.Dataset`]):
            The problems: a column `prompt`, and `answer` with the correct number.
        every_steps (`int`):
            Optimizer steps between two evaluations.
    """

    metric = ACCURACY

    def __init__(self, trainer: GRPOTrainer, dataset: Dataset, every_steps: int):
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} has to be at least 1.")
        self.trainer = trainer
        self.every_steps = every_steps
        prompt_ids = tokenize_prompts(
            dataset["prompt"], trainer.processing_class, getattr(trainer.args, "chat_template_kwargs", None)
        )
        # Sorted by length, a batch has little padding.
        self.problems = sorted(zip(prompt_ids, dataset["answer"], strict=True), key=lambda problem: len(problem[0]))

    def evaluate(self) -> float:
        """Returns the share of the problems that the policy solves now."""
        trainer, args = self.trainer, self.trainer.args
        was_training = trainer.model.training
        trainer.model.eval()
        try:
            problems = self.problems[args.process_index :: args.world_size]
            with (
                torch.no_grad(),
                unwrapped_for_generation(trainer) as model,
            ):
                solved = 0.0
                for start in range(0, len(problems), args.per_device_eval_batch_size):
                    prompt_ids, answers = zip(*problems[start : start + args.per_device_eval_batch_size], strict=True)
                    rewards = accuracy_reward(self._complete(model, prompt_ids), list(answers))
                    solved += sum(reward or 0.0 for reward in rewards)
            solved = trainer.accelerator.reduce(torch.tensor(solved, device=trainer.accelerator.device), "sum")
        finally:
            trainer.model.train(was_training)
        return solved.item() / len(self.problems)

    def _complete(self, model: torch.nn.Module, prompt_ids: tuple[list[int], ...]) -> list[str]:
        tokenizer, device = self.trainer.processing_class, self.trainer.accelerator.device
        prompts = [torch.tensor(ids, device=device) for ids in prompt_ids]
        input_ids = pad(prompts, padding_value=tokenizer.pad_token_id, padding_side="left")
        attention_mask = pad([torch.ones_like(ids) for ids in prompts], padding_value=0, padding_side="left")
        # Everything that a model's own generation settings could change is given.
        generation_config = GenerationConfig(
            max_new_tokens=self.trainer.args.max_completion_length,
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            repetition_penalty=1.0,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=self.trainer.eos_token_ids,
            disable_compile=True,
        )
        ids = model.generate(input_ids, attention_mask=attention_mask, generation_config=generation_config)
        return tokenizer.batch_decode(ids[:, input_ids.size(1) :], skip_special_tokens=True)

    def _evaluate_and_log(self, state: TrainerState) -> None:
        if any(record["step"] == state.global_step and self.metric in record for record in state.log_history):
            return
        accuracy = self.evaluate()
        trainer = self.trainer
        # Logging in training mode would consume the running step's metrics and print its completions once more. Any
        # logging takes back the request to log that step.
        was_training, log_completions = trainer.model.training, trainer.log_completions
        should_log = trainer.control.should_log
        trainer.model.eval()
        trainer.log_completions = False
        trainer.log({self.metric: accuracy})
        trainer.model.train(was_training)
        trainer.log_completions = log_completions
        trainer.control.should_log = should_log

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # A run that resumes from a checkpoint has had its first evaluation.
        if state.global_step == 0:
            self._evaluate_and_log(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # After the last step, too, here already: trackers may close their runs when training ends.
        if state.global_step % self.every_steps == 0 or control.should_training_stop:
            self._evaluate_and_log(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._evaluate_and_log(state)


class JSONLMetrics(TrainerCallback):
    """
    Writes every log record to `metrics.jsonl` in the output folder, one JSON object with its `step` a line. Numbers
    that are not finite become `null`.

    A new run starts the file anew. A run that resumes from a checkpoint keeps the records up to the checkpoint's step.
    """

    def __init__(self):
        self._path = None
        self._ended = False

    def _open(self, args: TrainingArguments, state: TrainerState) -> None:
        self._path = Path(args.output_dir) / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if state.global_step > 0 and self._path.exists():
            for line in self._path.read_text().splitlines(keepends=True):
                # A run that was killed may have left half a line.
                if line.endswith("\n") and json.loads(line)["step"] <= state.global_step:
                    kept.append(line)
        self._path.write_text("".join(kept))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero and (self._path is None or self._ended):
            self._open(args, state)
        self._ended = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        if self._path is None:
            # Another callback logs when training begins, before this one's turn.
            self._open(args, state)
        # The trainer's own record has the step, and nothing that another callback took out of `logs`.
        record = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in state.log_history[-1].items()
        }
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._ended = True
