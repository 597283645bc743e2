"""The arms of the comparison in docs/protocol.md, and which runs it makes, as a function of what runs have scored."""

import gzip
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BUDGETS = (0.005, 0.01, 0.02)  # nats per token from the initial policy
TARGET = 0.8  # of the endpoints at equal accuracy
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
    "proma_random": Arm("--algorithm proma_random", "--projection_bound", (0.5, 0.25, 1.0)),
    "reinforce_matched": Arm("--algorithm reinforce_matched", "--projection_bound", (0.5, 0.25, 1.0)),
}

CONTROLS = ("reinforce_matched", "proma_random")

# In order of importance: a block is tuned and tested before the next one begins
MAIN = ("proma", "reinforce", "reinforce_matched", "proma_random", "proma_intra", "grpo")
BLOCKS = (
    ("on_policy", MAIN),
    ("stale", ("proma", "reinforce", "reinforce_matched", "proma_intra", "grpo", "dppo")),
    ("on_policy", ("dppo", "isopo", "grpo_kl", "proma_both")),
)
QUICK_BLOCKS = (("on_policy", ("proma", "reinforce", "reinforce_matched", "proma_random")),)


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
        """Those of recipes/gsm8k.py in which it differs from others of its regime."""
        arm = ARMS[self.arm]
        own = [arm.parameter, str(arm.values[self.value])] if arm.parameter else []
        return [*arm.options.split(), "--learning_rate", f"{self.learning_rate:g}", *own, "--seed", str(self.seed)]


@dataclass(frozen=True)
class Plan:
    """
    Which runs a comparison makes, as a function of what runs have scored.

    Attributes:
        blocks (`Sequence`): Pairs of a regime and its arms, in order.
        tuning_seeds (`Sequence[int]`), test_seeds (`Sequence[int]`): Seeds.
        rates (`Sequence[int]`): The first learning rates, in quarters of a decade, two apart.
        extends (`bool`): Whether edges are extended and parameters tuned.
    """

    blocks: Sequence[tuple[str, Sequence[str]]] = BLOCKS
    tuning_seeds: Sequence[int] = TUNING_SEEDS
    test_seeds: Sequence[int] = TEST_SEEDS
    rates: Sequence[int] = FIRST_RATES
    extends: bool = True

    def missing(self, scores: Mapping[Run, float]) -> list[Run]:
        """The runs that can be made now, the most important first; empty when all have been made."""
        runs = []
        for regime, arms in self.blocks:
            chosen = {}
            for arm in arms:
                steps = self._tuning(regime, arm, scores)
                wanted = next(steps)
                if isinstance(wanted, list):
                    runs += [run for run in wanted if run not in scores]
                else:
                    chosen[arm] = wanted
            # Seeds outside: a block that is cut off has compared its arms
            if len(chosen) == len(arms):
                tests = [self._at(regime, arm, chosen[arm], seed) for seed in self.test_seeds for arm in arms]
                runs += [run for run in tests if run not in scores]
        return runs

    def chosen(self, regime: str, arm: str, scores: Mapping[Run, float]) -> tuple[int, int] | None:
        """The rate and the place of the parameter's value that an arm is tested with; `None` before it is tuned."""
        wanted = next(self._tuning(regime, arm, scores))
        return None if isinstance(wanted, list) else wanted

    def _tuning(self, regime: str, arm: str, scores: Mapping[Run, float]) -> Iterator[list[Run] | tuple[int, int]]:
        """Yields the runs of the first stage of tuning that is not complete; if all are, the best setting."""

        def runs(points: Sequence[tuple[int, int]]) -> list[Run]:
            return [self._at(regime, arm, point, seed) for point in points for seed in self.tuning_seeds]

        def mean(point: tuple[int, int]) -> float:
            return statistics.fmean(scores[run] for run in runs([point]))

        points = [(rate, 0) for rate in self.rates]
        while True:
            if any(run not in scores for run in runs(points)):
                yield runs(points)
            best = max(points, key=mean)
            edge = {min(points): (best[0] - 2, 0), max(points): (best[0] + 2, 0)}.get(best)
            if edge is None or not self.extends:
                break
            points = sorted([*points, edge])
        if self.extends:
            places = range(1, len(ARMS[arm].values))
            further = [(best[0], place) for place in places] or [(best[0] - 1, 0), (best[0] + 1, 0)]
            if any(run not in scores for run in runs(further)):
                yield runs(further)
            best = max([best, *further], key=mean)
        yield best

    def _at(self, regime: str, arm: str, point: tuple[int, int], seed: int) -> Run:
        return Run(regime, arm, *point, seed)


QUICK = Plan(QUICK_BLOCKS, tuning_seeds=(0,), test_seeds=(100, 101), rates=(-18, -16), extends=False)


def read_runs(path: Path) -> dict[Run, dict]:
    """The records of a runs.jsonl, or of a runs.jsonl.gz, by run; curves have whole numbers as steps."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    records = {}
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):  # a process that was killed may have left half a line
            continue
        record = json.loads(line)
        record["curves"] = {
            name: {int(step): value for step, value in curve.items()} for name, curve in record["curves"].items()
        }
        records[Run(**{name: record[name] for name in ("regime", "arm", "rate", "value", "seed")})] = record
    return records
