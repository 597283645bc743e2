"""How the sequences of an optimizer step are divided into microbatches, on which its gradient does not depend."""

import itertools

import pytest
import torch
from support.harness import GradientRecorder, StepRecorder, make_args, make_inputs, make_model, make_trainer

from proma_trl import DPPOConfig, DPPOTrainer
from proma_trl.trainer.step_layout import StepLayout, divide, positions
from proma_trl.trainer.step_microbatches import StepMicrobatches

LENGTHS = [(3, 9), (3, 1), (8, 2), (1, 1), (5, 30), (3, 9), (2, 2), (4, 4)]


def largest(groups, lengths):
    return max(positions([lengths[i] for i in group]) for group in groups)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_the_largest_microbatch_is_as_small_as_the_order_allows(n):
    groups = divide(LENGTHS, n)
    assert len(groups) == n and all(groups)
    ordered = list(itertools.chain(*groups))
    assert sorted(ordered) == list(range(len(LENGTHS)))
    completions = [LENGTHS[i][1] for i in ordered]
    assert completions == sorted(completions, reverse=True)
    every = [
        [ordered[a:b] for a, b in itertools.pairwise([0, *cuts, len(ordered)])]
        for cuts in itertools.combinations(range(1, len(ordered)), n - 1)
    ]
    assert largest(groups, LENGTHS) == min(largest(other, LENGTHS) for other in every)


def test_a_sequence_longer_than_all_others_stays_alone():
    groups = divide([(10, 500)] + [(10, 10)] * 31, 8)
    assert [0] in groups and max(map(len, groups)) <= 25


def test_equal_microbatches():
    groups = divide(LENGTHS, 4, equal=True)
    assert [len(group) for group in groups] == [2, 2, 2, 2] and groups[0] == [4, 0]


def layout(**settings):
    return StepLayout(**{"orders": True, "equal": False, "mean_of_sequences": True, "seed": 0, **settings})


def test_every_sequence_comes_once_and_with_all_that_is_its_own():
    microbatches = [make_inputs(4, seed, off_policy=True) for seed in range(3)]
    for inputs in microbatches:
        inputs["names"] = [f"{x:.5f}" for x in inputs["old_per_token_logps"][:, 0].tolist()]
    found, positions = layout(mean_of_sequences=False).arrange(microbatches, 0, [False] * 12)
    assert positions.sequences == 12 and positions.skipped == 0 and positions.laid_out < positions.padded
    whole = {name: torch.cat([x[name] for x in microbatches]) for name in ("completion_ids", "advantages")}
    names = [name for x in microbatches for name in x["names"]]
    seen = []
    for microbatch in found:
        for row, name in enumerate(microbatch.inputs["names"]):
            i = names.index(name)
            seen.append(i)
            for key, values in whole.items():
                assert torch.equal(microbatch.inputs[key][row], values[i])
        assert microbatch.inputs["num_items_in_batch"] == 40
        assert microbatch.num_counted == microbatch.inputs["completion_mask"].sum()
    assert sorted(seen) == list(range(12))


def test_the_order_is_a_function_of_seed_and_step():
    microbatches = [make_inputs(2, seed) for seed in range(8)]

    def order(seed, step):
        found, _ = layout(seed=seed).arrange(microbatches, step, [False] * 16)
        return [tuple(x.inputs["completion_mask"].sum(1).tolist()) for x in found]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, step)) for seed in (0, 1) for step in range(4)}) > 4
    assert sorted(order(0, 1)) == sorted(order(1, 2))


def test_the_first_microbatch_holds_several_sequences():
    """On one alone, sequence gradients can't be checked."""
    microbatches = [make_inputs(2, seed, completion=40) for seed in range(4)]
    for inputs in microbatches:
        inputs["completion_mask"][:, 2:] = 0
    for i in range(3):
        microbatches[i]["completion_mask"][0] = 1
    sizes = [
        [len(x.inputs["advantages"]) for x in layout().arrange(microbatches, step, [False] * 8)[0]]
        for step in range(20)
    ]
    assert all(step[0] > 1 for step in sizes) and all(1 in step for step in sizes)


def test_skipped_sequences_leave_no_microbatch_empty():
    microbatches = [make_inputs(4, seed) for seed in range(3)]
    found, positions = layout().arrange(microbatches, 0, [True] * 12)
    assert [len(x.inputs["advantages"]) for x in found] == [1, 1, 1] and positions.skipped == 9
    found, positions = layout(orders=False).arrange(microbatches, 0, [True] * 4 + [False, True] * 4)
    assert [len(x.inputs["advantages"]) for x in found] == [1, 2, 2] and positions.skipped == 7


def test_what_is_not_divided_by_sequence_stays_as_it_is():
    microbatches = [{**make_inputs(4, seed), "other": torch.zeros(7)} for seed in range(2)]
    found, _ = layout().arrange(microbatches, 0, [False] * 8)
    assert [x.inputs for x in found] == microbatches


def test_microbatches_with_and_without_images_are_not_reordered():
    """A microbatch of prompts without images would not run the model's vision tower."""
    microbatches = [{**make_inputs(4, seed), "num_images": [1, 0, 1, 1]} for seed in range(2)]
    found, _ = layout().arrange(microbatches, 0, [False] * 8)
    for microbatch, inputs in zip(found, microbatches, strict=True):
        assert torch.equal(microbatch.inputs["completion_ids"], inputs["completion_ids"])


def varied_reward(completions, **kwargs):
    return [float(len(completion) % 3) for completion in completions]


def step_gradients(folder, **settings):
    """What the optimizer gets in the first step of a training in float64, and the trainer."""
    recorder = GradientRecorder()
    base = {"gradient_accumulation_steps": 4, "num_generations": 2, "reward_funcs": varied_reward}
    settings = {**base, "order_by_length": True, **settings}
    model = make_model(settings.pop("architecture", "qwen3-tied"), dtype=torch.float64)
    trainer = make_trainer(folder, model, callbacks=[recorder], **settings)
    trainer.train()
    return recorder.gradients, trainer


def assert_same(found, want, tolerance=1e-6):
    for name, gradient in want.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_the_gradient_of_a_step_does_not_depend_on_the_division(loss_type, tmp_path):
    """Of REINFORCE, which adds up what sequences contribute. `bnpo` keeps TRL's division."""
    settings = {"projection": "none", "loss_type": loss_type, "steps_per_generation": 8}
    found, trainer = step_gradients(tmp_path, **settings)
    want, other = step_gradients(tmp_path, order_by_length=False, **settings)
    assert_same(found, want)
    ours, theirs = trainer.state.log_history[0], other.state.log_history[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    assert (ours["batch/positions_per_token"] < theirs["batch/positions_per_token"]) == (loss_type != "bnpo")


@pytest.mark.parametrize("settings", [{}, {"config_class": DPPOConfig, "trainer_class": DPPOTrainer}])
def test_sequences_without_an_advantage_are_not_run_where_the_method_is_plain(settings, tmp_path, monkeypatch):
    def half(completions, **kwargs):
        return [float(len(x) % 3) if i % 4 < 2 else 1.0 for i, x in enumerate(completions)]

    settings = {"projection": "none", "reward_funcs": half, "scale_rewards": "none", **settings}
    found, trainer = step_gradients(tmp_path, **settings)
    assert trainer.state.log_history[0]["batch/skipped_fraction"] >= 0.5
    monkeypatch.setattr(StepMicrobatches, "_skippable", lambda self, inputs: [False] * len(inputs["advantages"]))
    want, trainer = step_gradients(tmp_path, **settings)
    assert trainer.state.log_history[0]["batch/skipped_fraction"] == 0
    assert_same(found, want)


@pytest.mark.parametrize("settings", [{}, {"projection": "exact"}, {"isopo": "natural"}, {"intra_dim": 2}])
def test_projections_keep_sequences_without_an_advantage(settings, tmp_path):
    """Their directions are protected."""
    _, trainer = step_gradients(
        tmp_path, reward_funcs=lambda completions, **kwargs: [1.0] * len(completions), **settings
    )
    assert trainer.state.log_history[0]["batch/skipped_fraction"] == 0


def test_the_last_accumulation_of_an_epoch_is_shorter(tmp_path):
    """Five microbatches an epoch, three a step: each sequence is trained on once, in the step that TRL chose."""

    def run(**settings):
        recorder = StepRecorder()
        trainer = recorder.follow(
            make_trainer(
                tmp_path,
                prompts=10,
                gradient_accumulation_steps=3,
                steps_per_generation=5,
                num_generations=2,
                max_steps=4,
                learning_rate=0.0,
                **settings,
            )
        )
        trainer.train()
        return [
            sorted(tuple(row) for inputs in microbatches for row in inputs["completion_ids"].tolist())
            for _, _, microbatches in recorder.steps
        ]

    ours = run(order_by_length=True)
    assert [len(step) for step in ours] == [12, 8, 12, 8]
    assert ours == run(order_by_length=False)


def test_entropy_is_the_mean_over_the_steps_tokens(tmp_path):
    recorder = StepRecorder()
    trainer = recorder.follow(make_trainer(tmp_path, learning_rate=0.0, order_by_length=True))
    trainer.train()
    total = count = 0
    trainer.model.eval()
    for inputs in recorder.steps[0][2]:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length = inputs["completion_ids"].shape[1]
        with torch.no_grad():
            logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
        entropies = torch.distributions.Categorical(logits=logits).entropy() * inputs["completion_mask"]
        total, count = total + entropies.sum().item(), count + inputs["completion_mask"].sum().item()
    assert trainer.state.log_history[0]["entropy"] == pytest.approx(total / count, rel=1e-4)


def test_a_limit_that_can_not_be_kept_is_a_warning(tmp_path, caplog):
    make_trainer(tmp_path, max_tokens_per_microbatch=20).train()
    assert "more than `max_tokens_per_microbatch=20`" in caplog.text
    caplog.clear()
    make_trainer(tmp_path, max_tokens_per_microbatch=1000).train()
    assert "max_tokens_per_microbatch" not in caplog.text


@pytest.mark.parametrize(
    "settings, orders",
    [
        ({}, False),
        ({"intra_dim": 2, "projection": "none"}, False),
        ({"isopo": "norm", "projection": "none"}, False),
        ({"projection": "none"}, True),
        ({"projection": "none", "divergence": "binary_tv"}, True),
        ({"projection": "none", "loss_type": "bnpo"}, False),
        ({"order_by_length": True}, True),
        ({"order_by_length": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, False),
        ({"order_by_length": False, "projection": "none"}, False),
    ],
    ids=str,
)
def test_ordering_is_the_default_where_the_gradient_does_not_depend_on_it(settings, orders, tmp_path):
    assert make_args(tmp_path, **settings).orders_by_length is orders
