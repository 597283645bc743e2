"""Whole runs of the trainer on vision-language models, with prompts that hold different numbers of images."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from support import oracle
from support.harness import StepRecorder, make_args, trainer_gradients, vowel_reward
from support.tiny import make_tokenizer
from support.vision import settings_of, tiny_vlm
from torch.nn.functional import pad
from transformers import CLIPImageProcessorPil, LlavaProcessor, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

from proma_trl import PROMATrainer
from proma_trl.trainer.padding import Columns, PaddingTrimmer

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOKENS = {"llava": "<image>", "qwen2_5_vl": "<|image_pad|>"}


class WithoutVideos(Qwen2_5_VLProcessor):
    """A processor without one for videos, which would need torchvision."""

    def check_argument_for_proper_class(self, name, argument):
        return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)


def make_processor(family):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [TOKENS[family]]})
    template = TEMPLATE.replace("IMAGE", TOKENS[family] + ".")  # what is next to each other is one image to Qwen
    if family == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaProcessor(images, tokenizer, patch_size=4, chat_template=template, **strategy)
    size = {"shortest_edge": 8 * 8, "longest_edge": 16 * 16}
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    return WithoutVideos(images, tokenizer, chat_template=template)


def make_dataset():
    """Prompts with one image, two, and three, of two sizes. TRL's rollout fails where a prompt has none."""
    rng = np.random.default_rng(0)

    def image(width):
        return Image.fromarray(rng.integers(0, 255, (8, width, 3), dtype=np.uint8))

    images = [[image(8)], [image(8), image(16), image(8)], [image(16), image(8)], [image(16)]] * 4
    prompts = [[{"role": "user", "content": text}] for text in ("ab", "what is 2?", "cd", "e")] * 4
    return Dataset.from_dict({"prompt": prompts, "images": images})


def reward(completions, **kwargs):
    return vowel_reward([completion[0]["content"] for completion in completions])


def make_trainer(family, output_dir, **kwargs):
    processor = make_processor(family)
    tokenizer, own = processor.tokenizer, settings_of(family)
    names = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    text = {**own.get("text_config", {}), **names, "vocab_size": len(tokenizer)}
    token = tokenizer.convert_tokens_to_ids(TOKENS[family])
    model = tiny_vlm(family, {**own, "text_config": text}, token=token, attention="sdpa")
    pristine, recorder = copy.deepcopy(model), StepRecorder()
    trainer = PROMATrainer(
        model,
        reward,
        make_args(output_dir, max_grad_norm=0.0, num_generations=2, max_steps=2, **kwargs),
        make_dataset(),
        processing_class=processor,
    )
    trainer.pristine = pristine
    return recorder.follow(trainer), recorder


def objective(trainer, inputs, i, count):
    """`-1/N sum_t log p` of sequence i, from the model's own logits and the sequence's own images."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[i : i + 1]
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)[i : i + 1]
    own, length = {"input_ids": ids, "attention_mask": mask}, inputs["completion_ids"].size(1)
    if "mm_token_type_ids" in inputs:
        own["mm_token_type_ids"] = inputs["mm_token_type_ids"][i : i + 1]
    counts = inputs["num_images"]
    images = slice(sum(counts[:i]), sum(counts[: i + 1]))
    if counts[i] and "image_grid_thw" in inputs:
        rows = inputs["image_grid_thw"].prod(-1).cumsum(0).tolist()
        own["pixel_values"] = inputs["pixel_values"][([0, *rows])[images.start] : rows[images.stop - 1]].double()
        own["image_grid_thw"] = inputs["image_grid_thw"][images]
    elif counts[i]:
        own["pixel_values"] = inputs["pixel_values"][images].double()

    def value(model):
        logits = model(**own).logits[0, -length - 1 : -1] / trainer.temperature
        log_probs = logits.log_softmax(-1).gather(-1, ids[0, -length:].unsqueeze(-1)).squeeze(-1)
        total = inputs["num_items_in_batch"] * count / trainer.args.steps_per_generation
        return -(log_probs * inputs["completion_mask"][i]).sum() / total

    return value


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", TOKENS)
def test_what_reaches_the_optimizer_in_training(family, checkpointing, tmp_path):
    """Microbatches hold two prompts' completions, so that their sequences differ in their images."""
    trainer, recorder = make_trainer(family, tmp_path, gradient_checkpointing=checkpointing)
    trainer.train()
    mixed = [m["num_images"] for _, _, microbatches in recorder.steps for m in microbatches]
    assert any(len(set(counts)) > 1 for counts in mixed)
    model = copy.deepcopy(trainer.pristine)
    for weights, gradients, microbatches in recorder.steps:
        model.load_state_dict(weights)
        count = len(microbatches)
        objectives = [
            ([objective(trainer, inputs, i, count) for i in range(len(inputs["advantages"]))], inputs["advantages"])
            for inputs in microbatches
        ]
        oracle.assert_close(gradients, oracle.accumulate(model, objectives))


@pytest.mark.parametrize("family", TOKENS)
def test_columns_of_padding_are_left_out(family, tmp_path, monkeypatch):
    """Image tokens, and the numbers that say which tokens those are, stay where their columns go."""
    trainer, recorder = make_trainer(family, tmp_path)
    trainer.train()
    sides = {"prompt_ids": (3, 0), "prompt_mask": (3, 0), "completion_ids": (0, 5), "completion_mask": (0, 5)}
    sides |= {"token_type_ids": (3, 5), "mm_token_type_ids": (3, 5)}
    microbatches = [
        {name: pad(value, sides[name]) if name in sides else value for name, value in inputs.items()}
        for inputs in recorder.steps[0][2]
    ]
    shapes = []
    embeddings = trainer.model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[1]))
    found, losses = trainer_gradients(trainer, microbatches)
    found, longest = {name: g.clone() for name, g in found.items() if g is not None}, max(shapes)
    monkeypatch.setattr(
        PaddingTrimmer, "columns", lambda self, mask, scored, has_images=False: Columns(0, mask.shape[1], scored)
    )
    want, others = trainer_gradients(trainer, microbatches)
    assert longest <= max(shapes) - 5
    assert losses == pytest.approx(others, abs=1e-5)
    assert found.keys() == {name for name, gradient in want.items() if gradient is not None}
    for name, gradient in found.items():
        assert (gradient - want[name]).norm() <= 2e-5 * want[name].norm() + 1e-6, name
