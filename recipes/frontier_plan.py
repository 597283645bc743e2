"""The arms of the comparison in docs/protocol.md, and which runs it makes, as a function of what runs have scored."""

import gzip
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUNING_SEEDS, TEST_SEEDS = (0, 1), tuple(range(100, 110))
FIRST_RATES = (-20, -18, -16, -14)  # in quarters of a decade: 1e-5, 3.2e-5, 1e-4, 3.2e-4


@dataclass(frozen=True)
class Arm:
    """
    An algorithm, and the parameter of its own that is tuned beside the learning rate.

    Attributes:
        options (`str`): Options of recipes/gsm8k.py.
        parameter (`str`, *optional*): An option. Without one, the rates halfway to the best's neighbours are tried.
        values (`tuple`): Values of the parameter: the one with which rates are tuned, then the others.
    """

    options: str
    parameter: str | None = None
    values: tuple[str | float, ...] = ()


ARMS = {
    "proma": Arm("--algorithm proma", "--projection_bound", (0.5, 0.25, 1.0)),
    "proma_intra": Arm("--algorithm proma_intra", "--intra_dim", (10, 5, 20)),
    "proma_both": Arm("--algorithm proma_both", "--intra_dim", (10, 5, 20)),
    "isopo": Arm("--algorithm isopo", "--isopo", ("natural", "norm", "fisher")),
    "reinforce": Arm("--algorithm reinforce"),
    "grpo": Arm("--algorithm grpo", "--epsilon", (0.2, 0.1, 0.05)),
    "grpo_kl": Arm("--algorithm grpo", "--beta", (0.04, 0.1, 0.01)),
    "dppo": Arm("--algorithm dppo", "--divergence_threshold", (0.15, 0.05, 0.02)),
    "proma_dppo": Arm("--algorithm proma --divergence binary_tv", "--divergence_threshold", (0.15, 0.05, 0.02)),
    "intra_dppo": Arm("--algorithm proma_intra --divergence binary_tv", "--divergence_threshold", (0.15, 0.05, 0.02)),
    "proma_random": Arm("--algorithm proma_random", "--projection_bound", (0.5, 0.25, 1.0)),
    "reinforce_matched": Arm("--algorithm reinforce_matched", "--projection_bound", (0.5, 0.25, 1.0)),
    "intra_matched": Arm("--algorithm reinforce_matched --projection none", "--intra_dim", (10, 5, 20)),
}

CONTROLS = ("reinforce_matched", "proma_random")


@dataclass(frozen=True)
class Regime:
    """
    How all arms are trained, and what their runs are scored by.

    Attributes:
        config (`str`): The file in `configs`.
        completions_a_step (`int`): Completions that are sampled for an optimizer step.
        options (`str`): Options of the recipe beside those of the file.
        recipe (`str`): The module in `recipes` that trains.
        rollouts (`int`): In a run.
        budgets (`tuple`): Of the frontier score, in nats per token from the initial policy.
        target (`float`): The accuracy of the endpoints at equal accuracy.
    """

    config: str
    completions_a_step: int
    options: str = ""
    recipe: str = "gsm8k"
    rollouts: int = 20
    budgets: tuple[float, ...] = (0.005, 0.01, 0.02)
    target: float = 0.8


# TRL's microbatches, as in the paper
_SHUFFLED = "--order_by_length false"

REGIMES = {
    "on_policy": Regime("frontier_on_policy.yaml", 128, _SHUFFLED),
    "ordered": Regime("frontier_on_policy.yaml", 128, "--order_by_length true"),
    "stale": Regime("frontier_stale.yaml", 32, _SHUFFLED),
    "groups": Regime("frontier_on_policy.yaml", 128, f"--whole_groups true {_SHUFFLED}"),
    "adamw": Regime("frontier_on_policy.yaml", 128, f"--overlap_every 8 {_SHUFFLED}"),
    "sgd": Regime("frontier_on_policy.yaml", 128, f"--overlap_every 8 --optim sgd {_SHUFFLED}"),
    "sgd_test": Regime("frontier_on_policy.yaml", 128, f"--optim sgd {_SHUFFLED}"),
    "pretrained": Regime("sums_smollm2_cpu.yaml", 32, _SHUFFLED, "sums", 15, (0.2, 0.4, 0.8)),
}


@dataclass(frozen=True)
class Run:
    """A run: an arm with a learning rate (in quarters of a decade), the place of its parameter's value, and a seed."""

    regime: str
    arm: str
    rate: int
    value: int
    seed: int

    @property
    def learning_rate(self) -> float:
        """With two digits."""
        return float(f"{10 ** (self.rate / 4):.1e}")

    @property
    def name(self) -> str:
        """Of its folder."""
        arm = ARMS[self.arm]
        own = f"_{arm.parameter.removeprefix('--')}_{arm.values[self.value]}" if arm.parameter else ""
        return f"{self.regime}/{self.arm}_lr_{self.learning_rate:g}{own}_seed_{self.seed}"

    def options(self) -> list[str]:
        """Those of its recipe in which it differs from others of its regime."""
        arm = ARMS[self.arm]
        own = [arm.parameter, str(arm.values[self.value])] if arm.parameter else []
        return [*arm.options.split(), "--learning_rate", f"{self.learning_rate:g}", *own, "--seed", str(self.seed)]


@dataclass(frozen=True)
class Block:
    """
    Arms in one regime, which are tuned and then tested with the same seeds.

    Attributes:
        regime (`str`): One of [`REGIMES`].
        arms (`Sequence[str]`): Names of arms.
        rates (`Sequence[int]`): The first learning rates, in quarters of a decade, two apart.
        tuning_seeds (`Sequence[int]`), test_seeds (`Sequence[int]`): Seeds.
        extends (`bool`): Whether edges are extended and parameters tuned.
        tuned_in (`str`, *optional*): Another regime, whose choices are taken in the place of tuning.
    """

    regime: str
    arms: Sequence[str]
    rates: Sequence[int] = FIRST_RATES
    tuning_seeds: Sequence[int] = TUNING_SEEDS
    test_seeds: Sequence[int] = TEST_SEEDS
    extends: bool = True
    tuned_in: str | None = None

    def run(self, arm: str, point: tuple[int, int], seed: int) -> Run:
        """An arm's run at a point: a rate, and the place of the parameter's value."""
        return Run(self.regime, arm, *point, seed)

    def tuning(self, arm: str, scores: Mapping[Run, float]) -> list[Run] | tuple[int, int]:
        """The runs of the first stage of an arm's tuning that is not complete; if all are, the best point."""

        def runs(points: Sequence[tuple[int, int]]) -> list[Run]:
            return [self.run(arm, point, seed) for point in points for seed in self.tuning_seeds]

        def mean(point: tuple[int, int]) -> float:
            return statistics.fmean(scores[run] for run in runs([point]))

        points = [(rate, 0) for rate in self.rates]
        while True:
            if any(run not in scores for run in runs(points)):
                return runs(points)
            best = max(points, key=mean)
            edge = {min(points): (best[0] - 2, 0), max(points): (best[0] + 2, 0)}.get(best)
            if edge is None or not self.extends:
                break
            points = sorted([*points, edge])
        if not self.extends:
            return best
        places = range(1, len(ARMS[arm].values))
        further = [(best[0], place) for place in places] or [(best[0] - 1, 0), (best[0] + 1, 0)]
        if any(run not in scores for run in runs(further)):
            return runs(further)
        return max([best, *further], key=mean)


class Plan:
    """
    Which runs a comparison makes, as a function of what runs have scored.

    Args:
        blocks (`Sequence[Block]`): In order of importance.
    """

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = blocks

    def missing(self, scores: Mapping[Run, float]) -> list[Run]:
        """The runs that can be made now, the most important first; empty when all have been made."""
        runs = []
        for block in self.blocks:
            chosen = {arm: self.chosen(block, arm, scores) for arm in block.arms}
            if block.tuned_in is None:
                stages = [block.tuning(arm, scores) for arm, point in chosen.items() if point is None]
                runs += [run for stage in stages for run in stage]
            # Seeds outside: a block that is cut off has compared its arms
            if None not in chosen.values():
                runs += [block.run(arm, chosen[arm], seed) for seed in block.test_seeds for arm in block.arms]
        return [run for run in runs if run not in scores]

    def chosen(self, block: Block, arm: str, scores: Mapping[Run, float]) -> tuple[int, int] | None:
        """The point that an arm of a block is tested with; `None` before it is tuned."""
        if block.tuned_in is not None:
            block = next(other for other in self.blocks if other.regime == block.tuned_in and arm in other.arms)
        point = block.tuning(arm, scores)
        return None if isinstance(point, list) else point


_SGD_RATES = (-8, -6, -4, -2)  # 0.01 to 0.32
_MAIN = ("proma", "reinforce", "reinforce_matched", "proma_random", "proma_intra", "grpo")
PROTOCOL = Plan(
    [
        Block("on_policy", _MAIN),
        Block("groups", ("proma", "proma_intra"), tuned_in="on_policy"),
        Block("adamw", _MAIN, test_seeds=TUNING_SEEDS, tuned_in="on_policy"),
        Block("on_policy", ("intra_matched",)),
        Block("sgd", _MAIN[:4], _SGD_RATES, test_seeds=TUNING_SEEDS),
        Block("sgd_test", _MAIN[:4], tuned_in="sgd"),
        Block("stale", ("proma", "reinforce", "reinforce_matched", "grpo")),
        Block("stale", ("proma_intra",)),
        Block("stale", ("dppo", "intra_dppo")),
        Block("stale", ("proma_dppo",)),
        Block("stale", ("intra_matched",)),
        Block("on_policy", ("dppo", "grpo_kl", "isopo")),
        Block("on_policy", ("proma_both",)),
    ]
)
PRETRAINED = Plan(
    [
        Block(
            "pretrained",
            ("proma", "reinforce", "proma_intra", "grpo"),
            (-24, -22, -20),
            tuning_seeds=(0,),
            test_seeds=TEST_SEEDS[:6],
            extends=False,
        )
    ]
)
QUICK = Plan([Block("on_policy", _MAIN[:4], (-18, -16), tuning_seeds=(0,), test_seeds=(100, 101), extends=False)])


def read_run(line: str) -> tuple[Run, dict[str, Any]]:
    """A line of runs.jsonl: the run and its record, whose curves have whole numbers as steps."""
    record = json.loads(line)
    record["curves"] = {
        name: {int(step): value for step, value in curve.items()} for name, curve in record["curves"].items()
    }
    return Run(**{name: record[name] for name in ("regime", "arm", "rate", "value", "seed")}), record


def read_runs(path: Path) -> dict[Run, dict[str, Any]]:
    """The records of a runs.jsonl, or of a runs.jsonl.gz, by run. A line that a killed process left half is none."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return dict(read_run(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))
