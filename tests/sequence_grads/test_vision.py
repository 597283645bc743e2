"""Vision-language models, trained as a whole, with different numbers of images in the sequences of a microbatch."""

import pytest
import torch
from support import oracle
from support.sequences import lora
from support.vision import COUNTS, FAMILIES, OTHERS, VisionBatch, expected, run, tiny_vlm

from proma_trl import PROMA, ProjectedAccumulation
from proma_trl.sequence_grads.images import ImageRows

TOWERS = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "connector", "model.projector")


REFUSED = {
    "mistral3": "model.vision_tower.patch_conv.weight",
    "idefics2": "model.connector.perceiver_resampler.latents",
}
SOME = ("llava", "gemma3", "smolvlm", "qwen2_5_vl", "qwen3_vl")


def known(family):
    """A model of which all but what is refused is trained."""
    model = tiny_vlm(family)
    if family in REFUSED:
        model.get_parameter(REFUSED[family]).requires_grad_(False)
    return model


def compare(model, batches, defined=None, settings=None):
    """Holds a model's accumulated gradients against the definition's."""
    size = max(len(batch.ids) for batch in batches)
    got = run(ProjectedAccumulation(model, settings, microbatch_size=size), batches)
    want = expected(model, batches, **(defined or {}))
    assert any(any(tower in name for tower in TOWERS) and grad.norm() > 0 for name, grad in want.items())
    oracle.assert_close(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_parameters(family):
    """In float64: Qwen3.5's linear attention amplifies float32's rounding, by how much differs from CPU to CPU."""
    model = known(family).double()
    compare(model, [VisionBatch(model, counts, seed) for seed, counts in enumerate([COUNTS[3], (1, 1, 2), (0, 0, 1)])])


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("method", ["iterative", "exact"])
@pytest.mark.parametrize("family", SOME)
def test_adapters(family, method, k):
    model = lora(tiny_vlm(family))
    batches = [VisionBatch(model, counts, seed) for seed, counts in enumerate([COUNTS[k], COUNTS[k][::-1]])]
    compare(model, batches, {"method": method}, PROMA(method=method))


@pytest.mark.parametrize("family", SOME)
def test_eight_sequences_and_checkpointing(family):
    model = tiny_vlm(family)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    compare(model, [VisionBatch(model, COUNTS[8], seed) for seed in range(2)])


@pytest.mark.parametrize("counts", [(1, 1), (2, 0), (0, 2)])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_as_many_images_as_sequences(family, counts):
    """They are not taken for sequences."""
    model = tiny_vlm(family)
    compare(model, [VisionBatch(model, counts, seed) for seed in range(3)])


def test_a_microbatch_without_images():
    model = tiny_vlm("llava")
    compare(model, [VisionBatch(model, counts, seed) for seed, counts in enumerate([(1, 0, 2), (0, 0, 0), (1, 1, 1)])])


def test_a_text_decoder_beside_frozen_images():
    model = tiny_vlm("llava")
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    batches = [VisionBatch(model, (2, 0), seed) for seed in range(2)]
    oracle.assert_close(run(ProjectedAccumulation(model, microbatch_size=2), batches), expected(model, batches))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_intra_proma_leaves_layers_on_images_alone(family):
    """Also beside the accumulation-based variant."""
    model = tiny_vlm(family)
    batches = [VisionBatch(model, COUNTS[3], seed) for seed in range(2)]
    accumulation = ProjectedAccumulation(model, microbatch_size=3, intra_dim=3)
    projected = accumulation.projected_names()
    assert projected and not any(tower in name for name in projected for tower in TOWERS)
    got, want = run(accumulation, batches), expected(model, batches)
    oracle.assert_close(*({n: g for n, g in grads.items() if n not in projected} for grads in (got, want)))


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_refused_when_made(family):
    model = tiny_vlm(family, OTHERS[family])
    with pytest.raises(ValueError, match=r"(?s)model.vis.*outside the text decoder.*microbatch_size=1"):
        ProjectedAccumulation(model, microbatch_size=2)
    assert ProjectedAccumulation(model, microbatch_size=1)
    with pytest.raises(ValueError, match=r"(?s)lora_A.default` \(Linear\).*outside the text decoder"):
        ProjectedAccumulation(lora(model), microbatch_size=2)


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_refused_in_a_known_family(family):
    with pytest.raises(ValueError) as error:
        ProjectedAccumulation(tiny_vlm(family), microbatch_size=2)
    refused = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert len(refused) == 1 and REFUSED[family].rpartition(".")[0] in refused[0]


def test_inputs_that_do_not_tell_whose_images_they_are():
    model = tiny_vlm("qwen3_vl")
    batch, accumulation = VisionBatch(model, (1, 1)), ProjectedAccumulation(model, microbatch_size=2)
    inputs = batch.inputs([0, 1], torch.float32)
    videos = {"pixel_values_videos": inputs["pixel_values"], "video_grid_thw": inputs["image_grid_thw"]}
    with accumulation.capture(), pytest.raises(ValueError, match="images alone, and no videos"):
        model(input_ids=inputs["input_ids"], **videos)
    with accumulation.capture(), pytest.raises(ValueError, match=r"`model.visual.* ran inside `capture\(\)` before"):
        model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    hidden = model.get_input_embeddings()(inputs["input_ids"])
    with accumulation.capture(), pytest.raises(ValueError, match="known from token ids"):
        model(inputs_embeds=hidden, pixel_values=inputs["pixel_values"])


def test_rows_that_are_not_spread_as_image_tokens_are():
    rows = ImageRows([4, 0, 2])
    assert rows.counts(torch.zeros(12, 3)) == (8, 0, 4) and rows.counts(torch.zeros(3, 5)) == (2, 0, 1)
    assert rows.counts(torch.zeros(2, 5)) is None and rows.counts(torch.zeros(8, 5)) is None
    values = torch.randn(1, 12, 3)
    by_sequence = rows.by_sequence(values, "layer")
    assert by_sequence.shape == (3, 8, 3) and torch.equal(by_sequence[2, :4], values[0, 8:])
    assert not by_sequence[1].any() and not by_sequence[2, 4:].any()
    assert torch.equal(rows.together(by_sequence, values), values)
    with pytest.raises(ValueError, match=r"`layer` ran on a tensor of shape \(8, 5\).*their 6 image tokens"):
        rows.by_sequence(torch.zeros(8, 5), "layer")
