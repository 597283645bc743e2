"""The tables of results/frontier_cpu are those of its runs."""

from support.repository import ROOT

from proma_trl.recipes.frontier_plan import PROTOCOL, TEST_SEEDS, read_runs
from proma_trl.recipes.frontier_report import text_of
from proma_trl.recipes.frontier_summary import read_regimes, summarize


def rows(text):
    return [line for line in text.splitlines() if line.startswith(("| `", "- `"))]


def test_tables_of_the_comparison():
    folder = ROOT / "results" / "frontier_cpu"
    records = read_runs(folder / "runs.jsonl.gz")
    made = text_of(summarize(read_regimes(PROTOCOL, records)), len(TEST_SEEDS))
    assert rows(made)
    assert rows((folder / "README.md").read_text()) == rows(made)
