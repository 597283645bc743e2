"""The figures that compare algorithms. They need matplotlib, which comes with the extra `figures`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .curves import Curves, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {
    "eval_accuracy": "Validation accuracy",
    "global_kl": "KL from the initial policy (nats per token)",
    "entropy": "Entropy (nats per token)",
    "local_kl": "KL between successive policies (nats per token)",
}

# Okabe and Ito's colours, which the colour-blind can tell apart; dashes and markers do so in black and white.
_STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#E69F00", (0, (5, 1)), "v"),
    ("#56B4E9", (0, (3, 1, 1, 1)), "P"),
    ("#000000", (0, (1, 1)), "X"),
    ("#F0E442", (0, (5, 1, 1, 1)), "<"),
    ("#999999", (0, (2, 1)), ">"),
    ("#882255", (0, (4, 2, 1, 2)), "*"),
    ("#332288", (0, (8, 2)), "h"),
)


def _new_figure(size: tuple[float, float] = (10, 7), rows: int = 2, columns: int = 2) -> tuple["Figure", list["Axes"]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'proma-trl[figures]'") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Running means over the last `window` values."""
    sums = [sum(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    return [total / min(window, i + 1) for i, total in enumerate(sums)]


def _decorate(axes: Sequence["Axes"], x_label: str) -> None:
    for letter, axis, title in zip("abcd", axes, PANELS.values(), strict=True):
        axis.set_title(f"({letter}) {title}", fontsize=10, loc="left")
        _frame(axis, x_label)


def _frame(axis: "Axes", x_label: str) -> None:
    axis.set_xlabel(x_label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: "Figure", axes: Sequence["Axes"], stem: Path) -> None:
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    for suffix in (".png", ".svg"):
        figure.savefig(stem.with_suffix(suffix), dpi=150, metadata={"Date": None} if suffix == ".svg" else None)


def draw_runs(runs: Mapping[str, Sequence[Curves]], stem: Path, window: int = 1) -> None:
    """
    Draws the four panels of the paper's Figure 2 over the optimizer steps, as `<stem>.png` and `<stem>.svg`.

    Args:
        runs (`Mapping[str, Sequence[Curves]]`):
            Of each algorithm, its runs with different seeds. A line is their mean, a band one standard deviation.
        stem (`Path`):
            The files' path without suffix.
        window (`int`, *optional*, defaults to `1`):
            Values over which running means of the KL divergences and the entropy are drawn.

    Raises:
        ImportError: Without matplotlib.
    """
    figure, axes = _new_figure()
    for (label, seeds), (colour, dashes, _) in zip(runs.items(), _styles(len(runs)), strict=True):
        for axis, name in zip(axes, PANELS, strict=True):
            steps, means, spreads = mean_and_spread(seeds, name)
            if not steps:
                continue
            if name != "eval_accuracy":
                means, spreads = _smooth(means, window), _smooth(spreads, window)
            axis.plot(steps, means, color=colour, linestyle=dashes, linewidth=1.8, label=label)
            low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
            high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    _decorate(axes, "Optimizer step")
    _save(figure, axes, stem)


def draw_sweep(summaries: Mapping[float, Mapping[str, Mapping[str, float]]], stem: Path) -> None:
    """
    Draws each algorithm's summary at every learning rate, as `<stem>.png` and `<stem>.svg`. A larger marker is where
    the algorithm's own accuracy is best.

    Args:
        summaries (`Mapping`):
            Of each learning rate and each algorithm, what [`~proma_trl.tools.curves.summarize`] returned.
        stem (`Path`):
            The files' path without suffix.

    Raises:
        ImportError: Without matplotlib.
    """
    figure, axes = _new_figure()
    rates = sorted(summaries)
    labels = list(summaries[rates[0]])
    for label, (colour, dashes, marker) in zip(labels, _styles(len(labels)), strict=True):
        best = max(rates, key=lambda rate: summaries[rate][label]["eval_accuracy"])
        for axis, name in zip(axes, PANELS, strict=True):
            values = [summaries[rate][label][name] for rate in rates]
            axis.plot(rates, values, color=colour, linestyle=dashes, marker=marker, markersize=4, label=label)
            axis.plot([best], [summaries[best][label][name]], color=colour, marker=marker, markersize=10)
    for axis, name in zip(axes, PANELS, strict=True):
        axis.set_xscale("log")
        if name.endswith("_kl"):
            axis.set_yscale("log")
    _decorate(axes, "Learning rate")
    _save(figure, axes, stem)


def draw_frontiers(
    budgets: Sequence[float], arms: Mapping[str, Sequence[tuple[float, float, float]]], stem: Path
) -> None:
    """
    Draws the accuracy within each budget of divergence from the initial policy, as `<stem>.png` and `<stem>.svg`.

    Args:
        budgets (`Sequence[float]`): In nats per token.
        arms (`Mapping`): Of each arm and budget, the mean over seeds and the ends of its interval.
        stem (`Path`): The files' path without suffix.

    Raises:
        ImportError: Without matplotlib.
    """
    figure, (axis,) = _new_figure((8, 5.5), 1, 1)
    for (label, bands), (colour, dashes, _) in zip(arms.items(), _styles(len(arms)), strict=True):
        means, low, high = zip(*bands, strict=True)
        axis.plot(budgets, means, color=colour, linestyle=dashes, linewidth=1.8, label=label)
        axis.fill_between(budgets, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.set_ylabel("Validation accuracy", fontsize=9)
    _frame(axis, "Budget of KL from the initial policy (nats per token)")
    _save(figure, [axis], stem)


def draw_tuning(scores: Mapping[str, Mapping[float, float]], stem: Path) -> None:
    """
    Draws each arm's score over learning rates, as `<stem>.png` and `<stem>.svg`. A larger marker is the best.

    Args:
        scores (`Mapping`): Of each arm and learning rate, the mean score over seeds.
        stem (`Path`): The files' path without suffix.

    Raises:
        ImportError: Without matplotlib.
    """
    figure, (axis,) = _new_figure((8, 5.5), 1, 1)
    for (label, curve), (colour, dashes, marker) in zip(scores.items(), _styles(len(scores)), strict=True):
        best = max(curve, key=curve.get)
        axis.plot(
            [*curve], [*curve.values()], color=colour, linestyle=dashes, marker=marker, markersize=4, label=label
        )
        axis.plot([best], [curve[best]], color=colour, marker=marker, markersize=10)
    axis.set_xscale("log")
    axis.set_ylabel("Frontier score", fontsize=9)
    _frame(axis, "Learning rate")
    _save(figure, [axis], stem)


def _styles(count: int) -> list[tuple]:
    """As many styles, repeated only where there are more algorithms than anyone can tell apart."""
    return [_STYLES[i % len(_STYLES)] for i in range(count)]
