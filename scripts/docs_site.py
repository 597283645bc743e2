"""
What MkDocs does not do by itself for the documentation: a hook of `mkdocs.yml`.

Pages link to files of the repository by their paths in it, so that links also work where the repository is read. This
hook takes those files into the site, at the same paths, and rewrites the links. It also renders formulas as MathML.
"""

import html
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
HOME = "README.md"
# In the navigation, whether or not another page links to them
ALSO = ("CONTRIBUTING.md", "CHANGELOG.md", "RELEASING.md")

# The path of a Markdown link or image, without its anchor
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)[^)\s#]+")
CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Takes in the files outside the documentation's folder that pages link to, and those that these link to."""
    waiting = [HOME, *ALSO]
    for file in files.documentation_pages():
        waiting += _linked(_in_repository(file.src_uri))
    taken = set()
    while waiting:
        path = waiting.pop()
        if path in taken or path.startswith("docs/") or not (ROOT / path).is_file():
            continue
        taken.add(path)
        files.append(File.generated(config, _on_site(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += _linked(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links from paths in the repository to paths on the site."""
    here = _in_repository(page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri) or "."
    return _outside_code(
        markdown,
        lambda text: LINK.sub(lambda link: posixpath.relpath(_on_site(_resolve(here, link[0])), folder), text),
    )


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Renders formulas, so that no script has to."""
    return FORMULA.sub(
        lambda found: convert(html.unescape(found[2]), display="inline" if found[1] == "span" else "block"), content
    )


def _linked(path: str) -> Iterator[str]:
    found = []
    _outside_code((ROOT / path).read_text(encoding="utf-8"), lambda text: found.extend(LINK.findall(text)) or "")
    return (_resolve(path, link) for link in found)


def _outside_code(markdown: str, function: Callable[[str], str]) -> str:
    pieces, end = [], 0
    for code in CODE.finditer(markdown):
        pieces += [function(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, function(markdown[end:])])


def _resolve(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _in_repository(src_uri: str) -> str:
    """Where a page of the site stands in the repository."""
    if src_uri == "index.md":
        return HOME
    return f"docs/{src_uri}" if (ROOT / "docs" / src_uri).is_file() else src_uri


def _on_site(path: str) -> str:
    return "index.md" if path == HOME else path.removeprefix("docs/")
