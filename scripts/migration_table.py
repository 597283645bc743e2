"""Writes the tables of `docs/migration.md`: each field of the installed TRL's `GRPOConfig`, and what becomes of it."""

from collections.abc import Iterable
from dataclasses import Field, fields
from importlib.metadata import version
from pathlib import Path

from transformers import TrainingArguments
from trl import GRPOConfig

from proma_trl import DPPOConfig, PROMAConfig
from proma_trl.trainer.grpo_fields import OTHER_MEANING, PARTLY_REFUSED, REFUSED, SAME, default_of

PAGE = Path(__file__).parents[1] / "docs" / "migration.md"
START, END = "<!-- grpo fields: ", "<!-- end of grpo fields -->"


def updated(page: str) -> str:
    """Returns the page with the tables of the installed versions between its markers."""
    before, start, rest = page.partition(START)
    marker, _, old = rest.partition("\n")
    return f"{before}{start}{marker}\n{tables()}\n{END}{old.partition(END)[2]}"


def tables() -> str:
    """Returns the tables as Markdown: GRPO's own fields, and those of transformers' `TrainingArguments`, folded."""
    inherited = {field.name for field in fields(TrainingArguments)}
    own = [field for field in fields(GRPOConfig) if field.name not in inherited]
    rest = [field for field in fields(GRPOConfig) if field.name in inherited]
    return f"""\
The {len(own)} fields of TRL {version("trl")}:

{_table(own)}

<details markdown="1">
<summary>And the {len(rest)} fields of transformers {version("transformers")}</summary>

{_table(rest)}

</details>"""


def _table(grpo_fields: Iterable[Field]) -> str:
    rows = ["| Field | Default | With PROMA | Note |", "| --- | --- | --- | --- |"]
    for field in sorted(grpo_fields, key=lambda field: field.name):
        kind, text = _answer(field)
        rows.append(f"| `{field.name}` | `{default_of(field)!r}` | {kind} | {text} |")
    return "\n".join(rows)


def _answer(field: Field) -> tuple[str, str]:
    """Returns what becomes of a field, and what there is to say about it."""
    ours, alone = (default_of(config.__dataclass_fields__[field.name]) for config in (PROMAConfig, DPPOConfig))
    kind, text = next(
        (kind, texts[field.name])
        for kind, texts in (
            ("refused", {name: f"{reason[0].upper()}{reason[1:]}." for name, reason in REFUSED.items()}),
            ("in part", PARTLY_REFUSED),
            ("more to it", OTHER_MEANING),
            ("same", dict.fromkeys(SAME, "")),
        )
        if field.name in texts
    )
    if ours != default_of(field):
        kind += f", default `{ours!r}`" + ("" if alone == ours else f" (`{alone!r}` in `DPPOConfig`)")
    return kind, text


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
