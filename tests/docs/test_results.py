"""
The tables of the comparison's folders in results/ are those of their runs, and the figures that README and docs quote
of the comparison are those of the tables' rows that they name.
"""

import json

import pytest
from support.repository import ROOT

from proma_trl.recipes.frontier_plan import PRETRAINED, PROTOCOL, read_runs
from proma_trl.recipes.frontier_report import text_of
from proma_trl.recipes.frontier_summary import read_regimes, summarize


@pytest.mark.parametrize("folder, plan", [("frontier_cpu", PROTOCOL), ("frontier_smollm2", PRETRAINED)])
def test_tables_of_the_comparison(folder, plan):
    folder = ROOT / "results" / folder
    summary = summarize(read_regimes(plan, read_runs(folder / "runs.jsonl.gz")))
    _, _, rest = (folder / "README.md").read_text().partition("<!-- tables -->")
    tables, _, _ = rest.partition("<!-- end of tables -->")
    assert tables.strip() == text_of(plan, summary).strip()
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
