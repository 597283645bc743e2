"""
The tables of the comparison's folders in results/ are those of their runs, and what README and docs quote of the
comparison stands in the rows that they name.
"""

import json
import re
import sys

import pytest
from support.repository import ROOT

from proma_trl.recipes.frontier_plan import PRETRAINED, PROTOCOL, read_runs
from proma_trl.recipes.frontier_report import text_of
from proma_trl.recipes.frontier_summary import read_regimes, summarize
from proma_trl.recipes.shown_steps import table

sys.path.insert(0, str(ROOT / "benchmarks"))

from ordering import table as ordering_table

FIGURE = re.compile(r"(?<![\w.])[−+-]?\d+\.\d+(?:e[−+-]?\d+)?|(?<![\w.,])\d{4}(?!\w|,\d)|\d+ of \d+")
# A row of a table, by its name and the section that it is in
ROW_LINK = re.compile(r"\[`([^`]+)`\]\(([^)\s]+\.md)#([^)]+)\)")
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
CODE = re.compile(r"`[^`]*`")


def rounded(summary):
    """Without the last digits of floats, which other versions of numpy may round otherwise."""
    return json.loads(json.dumps(summary), parse_float=lambda digits: f"{float(digits):.9g}")


@pytest.mark.parametrize("folder, plan", [("frontier_cpu", PROTOCOL), ("frontier_smollm2", PRETRAINED)])
def test_tables_of_the_comparison(folder, plan):
    folder = ROOT / "results" / folder
    summary = summarize(read_regimes(plan, read_runs(folder / "runs.jsonl.gz")))
    _, _, rest = (folder / "README.md").read_text().partition("<!-- tables -->")
    tables, _, _ = rest.partition("<!-- end of tables -->")
    assert tables.strip() == text_of(plan, summary).strip()
    assert rounded(json.loads((folder / "summary.json").read_text())) == rounded(summary)


def test_ordering_by_length():
    folder = ROOT / "results" / "ordering_cpu"
    records = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    _, _, rest = (folder / "README.md").read_text().partition("<!-- table -->")
    assert rest.partition("<!-- end of table -->")[0].strip() == ordering_table(records).strip()


def test_what_the_task_teaches():
    """The table of recipes/shown_steps.py, and what is said of it."""
    folder = ROOT / "results" / "frontier_cpu"
    found = json.loads((folder / "shown_steps.json").read_text())
    before, after = found["before"], found["after"]
    section = sections(folder / "README.md")["what-the-task-teaches"]
    assert table({"before": before, "after": after}) in section
    known = {f"{value:.3f}" for value in (*before.values(), *after.values(), found["explained"])}
    prose = section.partition("recipes/shown_steps.py")[2]
    # Before training every run of the comparison has the same accuracy
    runs = read_runs(folder / "runs.jsonl.gz").values()
    (initial,) = {record["curves"]["eval_accuracy"][0] for record in runs}
    known.add(f"{initial:.3f}")
    assert set(re.findall(r"0\.\d{3}", prose)) <= known
    shares = {f"{100 * found[name]:.0f}%" for found in (before, after) for name in found}
    assert set(re.findall(r"\d+%", prose)) <= shares
    sentence = (
        f"{100 * before['forced_greedy_right']:.0f}% before training and {100 * after['forced_greedy_right']:.0f}%"
    )
    assert sentence in (ROOT / "README.md").read_text()
    # Nearly all of the rise is the habit's, and nothing is learned where steps are forced
    assert found["explained"] - before["right"] > 0.8 * (after["right"] - before["right"])
    assert after["forced_greedy_right"] <= before["forced_greedy_right"]


def test_a_ratio_that_is_quoted():
    arms = json.loads((ROOT / "results" / "frontier_cpu" / "summary.json").read_text())["sgd_test"]["arms"]
    ratio = arms["proma"]["local_kl_to_target"][0] / arms["reinforce"]["local_kl_to_target"][0]
    for name in ("results/frontier_cpu/README.md", "results/ablations_cpu/README.md", "docs/settings.md"):
        said = re.search(r"(\d\.\d)\s+times\s+REINFORCE's", (ROOT / name).read_text())
        assert said[1] == f"{ratio:.1f}", name


def slug(heading):
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def sections(path):
    """The text of a page's sections up to the next heading, by their anchors."""
    found, anchor = {}, ""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            anchor = slug(line.lstrip("#"))
        found[anchor] = found.get(anchor, "") + line + "\n"
    return found


def units(text):
    """Rows of tables, items of lists and paragraphs, each in one line."""
    lines = [line for line in text.splitlines() if not line.startswith("| --- ")]
    return [" ".join(part.split()) for part in re.split(r"\n(?=\s*\n|\| |- )", "\n".join(lines)) if part.strip()]


def value(figure):
    return float(figure.replace("−", "-"))


def numbers(text):
    """The numbers of a text, both of `8 of 10` among them."""
    found = [*FIGURE.findall(text), *re.findall(r"(?<![\w.])\d+(?![\w.])", text)]
    return {value(part) for figure in found for part in figure.split(" of ")}


def stands_in(figure, known):
    """Whether a figure is among numbers: with its sign if it has one, else in size."""
    return value(figure) in known if figure[0] in "+−-" else value(figure) in {abs(number) for number in known}


def rows_named(path, name, anchor):
    """The rows of this name in a section of a page."""
    section = sections(path).get(anchor)
    assert section is not None, f"{path} has no section #{anchor}"
    rows = [row for row in section.splitlines() if row.startswith((f"| `{name}` |", f"| {name} |"))]
    assert rows, f"{path}#{anchor} has no row {name}"
    return rows


def quoted(unit):
    """The figures of a unit, outside of code and the names of links."""
    text = CODE.sub("", LINK.sub(" ", unit))
    return [part for figure in FIGURE.findall(text) for part in figure.split(" of ")]


@pytest.mark.parametrize(
    ("name", "section"),
    [("README.md", "is-it-worth-it"), ("docs/results.md", "is-it-worth-it"), ("docs/results.md", "dppo")],
)
def test_figures_are_those_of_the_rows_that_they_name(name, section):
    named_rows = 0
    for unit in units(sections(ROOT / name)[section]):
        page = (ROOT / name).parent
        named = [
            row for title, path, anchor in ROW_LINK.findall(unit) for row in rows_named(page / path, title, anchor)
        ]
        # Accuracies as they are, or in points
        known = numbers(" ".join(named))
        known |= {round(100 * number, 6) for number in known}
        # The accuracy that is in the title of a section
        known |= {0.8} if "-at-an-accuracy-of-08)" in unit else set()
        for figure in quoted(unit) if named else ():
            assert stands_in(figure, known), f"{figure} is in none of the rows that this names: {unit}"
        named_rows += len(named)
    assert named_rows


@pytest.mark.parametrize(
    "name",
    [
        "docs/variants.md",
        "docs/settings.md",
        "docs/dppo.md",
        *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "results").glob("frontier_*/README.md")),
    ],
)
def test_figures_are_on_the_pages_of_results_that_are_linked(name):
    """Weaker, for running text: a figure with three decimals stands in a table of a page that its paragraph links."""
    path = ROOT / name
    prose, _, _ = path.read_text().partition("<!-- tables -->")
    checked = 0
    for unit in units(prose):
        linked = {
            (path.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]*results/[^)#\s]*\.md)", unit)
        }
        pages = {path} if "frontier_" in name else linked
        if not any("frontier_" in str(page) for page in pages):
            continue
        tables = "\n".join(line for page in pages | linked for line in page.read_text().splitlines() if "|" in line)
        known = numbers(tables)
        for count in re.findall(r"\d+ of \d+", CODE.sub("", unit)):
            assert any(numbers(count) <= numbers(row) for row in tables.splitlines()), f"{count}: {unit}"
        for figure in quoted(unit):
            if re.search(r"\.\d{3}$|e[-−]\d", figure):
                assert stands_in(figure, known), f"{figure} is in no table of {sorted(map(str, pages))}: {unit}"
                checked += 1
    assert checked
