"""
Reads docstrings in the style of Hugging Face's libraries for the API reference: an extension of griffe, which
`mkdocs.yml` names.

Types and defaults come from signatures, so those that docstrings repeat are left out; shapes stay.
"""

import re
from typing import Any

from griffe import Alias, Extension, Module, NameResolutionError, Object

REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")
# One parameter or more, with what stands in parentheses: "name (`type`, *optional*), name ([`Class`]):"
ONE = r"\w+ \(\[?`[^:\n]*?\)"
PARAMETERS = re.compile(rf"^( +)({ONE}(?:, {ONE})*):(.*)$", re.MULTILINE)
PARAMETER = re.compile(r"(\w+) \((\[?`.*?)\)(?=, \w+ \(\[?`|$)")
SHAPE = re.compile(r"`(\(.*?\))`")


class HuggingFaceStyle(Extension):
    """Rewrites docstrings once a package is read."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        _rewrite(pkg)


def _rewrite(obj: Object | Alias) -> None:
    if obj.is_alias:
        return
    if obj.docstring:
        text = PARAMETERS.sub(_google_style, obj.docstring.value)
        obj.docstring.value = REFERENCE.sub(lambda found: _link(obj, found[1]), text)
    for member in obj.members.values():
        _rewrite(member)


def _google_style(line: re.Match) -> str:
    indent, names, text = line.groups()
    parameters = PARAMETER.findall(names)
    shapes = [SHAPE.search(kind) for _, kind in parameters]
    return "\n".join(
        f"{indent}{name}:{f' {shape[0]}.' if shape else ''}{text}"
        for (name, _), shape in zip(parameters, shapes, strict=True)
    )


def _link(obj: Object, name: str) -> str:
    """A reference to an object of the package where the site has it, else its name alone."""
    try:
        path = obj.resolve(name)
    except NameResolutionError:
        path = name if "." in name else f"proma_trl.{name}"
    return f'<autoref identifier="{path}" optional><code>{name.rpartition(".")[2]}</code></autoref>'
