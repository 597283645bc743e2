"""Settings from YAML files: every field takes what people write there."""

import pytest

from proma_trl.recipes.parser import RecipeParser, UsageError, read_settings, unknown
from proma_trl.recipes.train import TrainArguments
from proma_trl.recipes.training import make_parser

PARSER = make_parser(TrainArguments, "proma")
LISTS = [action for action in PARSER._actions if action.nargs == "+"]
SWITCHED_OFF = [action for action in PARSER._actions if {"no", "none"} & {*(action.choices or ())}]
BOOLEANS = [action for action in PARSER._actions if getattr(action.type, "__name__", "") == "string_to_bool"]


def defaults(tmp_path, text):
    """What a file's settings become, before the dataclasses see them."""
    (tmp_path / "run.yaml").write_text(text)
    parser = make_parser(TrainArguments, "proma")
    parser.dataclass_types = []
    with pytest.MonkeyPatch.context() as patched:
        # All settings as they are; none is required
        patched.setattr(
            RecipeParser, "parse_args_into_dataclasses", lambda self, args, **_: (self.parse_args(args), [])
        )
        return vars(parser.parse_args_and_config(["--config", str(tmp_path / "run.yaml")])[0])


def test_one_value_stands_for_a_list(tmp_path):
    assert len(LISTS) >= 8
    found = defaults(tmp_path, "".join(f"{action.dest}: 1\n" for action in LISTS))
    for action in LISTS:
        value = found[action.dest]
        assert isinstance(value, list) and len(value) == 1, action.dest
        if action.type in (str, float):
            assert value == [action.type(1)], action.dest
    assert defaults(tmp_path, "reward_weights: [1, 1e-1]\nreward_funcs: [a, 2]\n")["reward_weights"] == [1.0, 0.1]


@pytest.mark.parametrize("written", ["no", "off", "No", "false"])
def test_no_stands_for_itself(tmp_path, written):
    assert {"eval_strategy", "save_strategy", "projection", "isopo"} <= {action.dest for action in SWITCHED_OFF}
    found = defaults(tmp_path, "".join(f"{action.dest}: {written}\n" for action in SWITCHED_OFF))
    assert all(found[action.dest] in ("no", "none") for action in SWITCHED_OFF)


@pytest.mark.parametrize("written,value", [("yes", True), ("on", True), ("no", False), ("'off'", None)])
def test_booleans_are_booleans(tmp_path, written, value):
    text = "".join(f"{action.dest}: {written}\n" for action in BOOLEANS)
    if value is None:
        with pytest.raises(SystemExit):  # a text in quotes that no parser takes for one
            defaults(tmp_path, text)
        return
    found = defaults(tmp_path, text)
    assert all(found[action.dest] is value for action in BOOLEANS)


def test_numbers(tmp_path):
    found = defaults(
        tmp_path, "learning_rate: 1e-6\nmax_steps: 3.0\nwarmup_steps: 10\nprojection_bound: inf\nseed: '7'\n"
    )
    assert found["learning_rate"] == 1e-6 and found["max_steps"] == 3 and found["seed"] == 7
    assert found["warmup_steps"] == 10.0 and found["projection_bound"] == float("inf")
    assert defaults(tmp_path, "projection_bound: null\ndataset_config: no\n")["dataset_config"] == "no"
    for wrong in ("max_steps: 3.5", "max_steps: yes", "learning_rate: fast", "seed: [1]", "max_steps: .inf"):
        with pytest.raises(UsageError, match=f"run.yaml: `{wrong.split(':')[0]}: .*`: "):
            defaults(tmp_path, wrong)


def test_names_and_files(tmp_path):
    assert unknown("setting", "lerning_rate", ["learning_rate"]).endswith("did you mean `learning_rate`?")
    assert unknown("setting", "frobnicate", ["learning_rate"]) == "unknown setting `frobnicate`."
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"run\.yaml.*: not valid YAML"):
        read_settings(str(path))
    path.write_text("")
    with pytest.raises(UsageError, match="not a file of settings"):
        read_settings(str(path))
