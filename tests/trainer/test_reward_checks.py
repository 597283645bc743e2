"""What reward functions are called with is known before training: what is wrong is said before the model loads."""

import asyncio
import functools

import pytest
import torch
from datasets import Dataset
from support.harness import TOKENIZER, make_args, make_model, vowel_reward
from trl import GRPOTrainer
from trl.rewards import accuracy_reward

from proma_trl import PROMATrainer
from proma_trl.trainer.reward_checks import RewardError, check_rewards, check_weights, returning_rewards


def brevity(completions, longest, **kwargs):
    return [float(len(text) <= most) for text, most in zip(completions, longest, strict=True)]


async def brevity_later(completions, longest, **kwargs):
    return brevity(completions, longest)


class Brevity:
    def __call__(self, completions, longest, **kwargs):
        return brevity(completions, longest)


def singular(prompt, completion, **kwargs):
    return [0.0] * len(completion)


def no_kwargs(completions, longest):
    return [0.0] * len(completions)


def by_position(completions, /, **kwargs):
    return [0.0]


def default(completions, longest=3, **kwargs):
    return [0.0] * len(completions)


def everything(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, colour):
    return [0.0] * len(completions)


GOOD = [default, everything, functools.partial(brevity, longest=[3]), torch.nn.Linear(1, 1), "a/model", max]
BAD = {
    brevity: "brevity needs a column `longest`; mine.jsonl has prompt, colour.",
    brevity_later: "brevity_later needs a column `longest`; mine",
    Brevity(): "Brevity needs a column `longest`; mine",
    functools.partial(brevity, scale=2): "brevity needs a column `longest`; mine",
    accuracy_reward: "accuracy_reward needs a column `solution`; mine",
    singular: "needs columns `prompt`, `completion`; .* Prompts and completions come as `prompts` and `completions`",
    no_kwargs: "no_kwargs takes no `prompts`, .*`colour`, which it is called with. Give it a last `..kwargs`",
    by_position: "by_position takes `completions` by position only",
}


@pytest.mark.parametrize("func", GOOD)
def test_functions_that_can_be_called(func):
    check_rewards([func], ["prompt", "colour"], "mine.jsonl")


@pytest.mark.parametrize("func", BAD)
def test_functions_that_can_not(func):
    with pytest.raises(ValueError, match=BAD[func]):
        check_rewards([default, func], ["prompt", "colour"], "mine.jsonl")


def test_all_of_them_at_once():
    with pytest.raises(ValueError) as raised:
        check_rewards([brevity, accuracy_reward], ["prompt"], "mine.jsonl", ["rewards.py:brevity", "accuracy_reward"])
    first, second = str(raised.value).splitlines()
    assert first.startswith("rewards.py:brevity needs") and second.startswith("accuracy_reward needs")


def test_weights():
    check_weights(None, ["one", "two"])
    check_weights([1.0, 2.0], ["one", "two"])
    with pytest.raises(ValueError, match=r"`reward_weights` has 1 value for 2 reward functions \(one, two\)"):
        check_weights([1.0], ["one", "two"])


def make(tmp_path, trainer=PROMATrainer, reward_funcs=vowel_reward, columns=None, evaluated=None, **settings):
    data = Dataset.from_dict({"prompt": ["ab"] * 16} | (columns or {}))
    model = settings.pop("model", None) or make_model()
    return trainer(
        model=model,
        reward_funcs=reward_funcs,
        args=make_args(tmp_path, **settings),
        train_dataset=data,
        eval_dataset=evaluated,
        processing_class=TOKENIZER,
    )


def test_the_trainer_says_so_before_the_model_loads(tmp_path):
    with pytest.raises(ValueError, match="brevity needs a column `longest`; `train_dataset` has prompt"):
        make(tmp_path, reward_funcs=[vowel_reward, brevity], model="no/model")
    with pytest.raises(ValueError, match="`reward_weights` has 2 values for 1 reward function"):
        make(tmp_path, reward_weights=[1.0, 1.0], model="no/model")
    columns = {"longest": [1] * 16}
    with pytest.raises(ValueError, match=r"brevity needs a column `longest`; `eval_dataset\['held_out'\]` has"):
        evaluated = {"held_out": Dataset.from_dict({"prompt": ["ab"]})}
        make(tmp_path, reward_funcs=brevity, columns=columns, evaluated=evaluated, model="no/model")
    with pytest.raises(ValueError, match="brevity needs a column `longest`; `train_dataset` has prompt"):
        make(tmp_path, reward_funcs=brevity, columns=columns, remove_unused_columns=True, model="no/model")


def test_what_the_trainer_is_called_with_is_what_is_checked(tmp_path):
    """TRL passes no more and no less to a function without `**kwargs`."""
    seen = []

    def strict(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, longest):
        seen.append(longest)
        return [0.0, 1.0] * (len(completions) // 2)

    trainer = make(tmp_path, reward_funcs=strict, columns={"longest": [1] * 16}, max_steps=1)
    trainer.train()
    assert seen

    def computed(rows):
        return {"prompt": rows["prompt"], "longest": [9] * len(rows["prompt"])}

    data = Dataset.from_dict({"prompt": ["ab"] * 16}).with_transform(computed)
    PROMATrainer(make_model(), brevity, make_args(tmp_path), data, processing_class=TOKENIZER)


@pytest.mark.parametrize("returned", [1.0, None, ["high"], [1.0]], ids=str)
@pytest.mark.parametrize("later", [False, True])
def test_other_than_a_list_of_rewards(returned, later):
    async def wait(completions, **kwargs):
        return returned

    func = returning_rewards(wait if later else lambda completions, **kwargs: returned, "rewards.py:mine")
    with pytest.raises(RewardError, match=r"rewards.py:mine returned .*2 completions"):
        asyncio.run(func(completions=["a", "b"])) if later else func(completions=["a", "b"])


def test_rewards_pass_as_they_are(tmp_path):
    func = returning_rewards(functools.partial(brevity, longest=[1, 1]), "brevity")
    assert func(completions=["a", "bb"]) == [1.0, 0.0] and func.__name__ == "brevity"
    assert returning_rewards(Brevity(), "x").__name__ == "Brevity"
    with_none = returning_rewards(lambda completions: [None, torch.tensor(0.5)], "x")
    assert with_none(completions=["a", "b"]) == [None, 0.5]
    # With TRL's trainer, too
    wrong = returning_rewards(lambda completions, **kwargs: 0.5, "rewards.py:half")
    trainer = GRPOTrainer(
        make_model(), wrong, make_args(tmp_path), Dataset.from_dict({"prompt": ["a"] * 16}), processing_class=TOKENIZER
    )
    with pytest.raises(RewardError, match=r"rewards.py:half returned 0.5, and not a list with one number"):
        trainer.train()
