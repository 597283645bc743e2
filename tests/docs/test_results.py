"""The tables of the comparison's folders in results/ are those of their runs."""

import pytest
from support.repository import ROOT

from proma_trl.recipes.frontier_plan import PRETRAINED, PROTOCOL, read_runs
from proma_trl.recipes.frontier_report import text_of
from proma_trl.recipes.frontier_summary import read_regimes, summarize


def rows(text):
    return [line for line in text.splitlines() if line.startswith(("| `", "- `"))]


@pytest.mark.parametrize("folder, plan", [("frontier_cpu", PROTOCOL), ("frontier_smollm2", PRETRAINED)])
def test_tables_of_the_comparison(folder, plan):
    records = read_runs(ROOT / "results" / folder / "runs.jsonl.gz")
    made = text_of(plan, summarize(read_regimes(plan, records)))
    page = (ROOT / "results" / folder / "README.md").read_text()
    assert rows(made)
    assert rows(page) == rows(made)
