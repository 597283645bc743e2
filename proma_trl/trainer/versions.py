"""Refuses, before they are imported, packages outside the bounds that the trainers were tested within."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

# What the trainers extend from inside
_CHECKED = ("trl", "transformers", "accelerate", "peft")


def check_versions() -> None:
    """
    Check the installed versions against the requirements in this package's metadata. A copy of the package that isn't
    installed has none, and nothing is checked.

    Raises:
        ImportError: If one is missing or out of bounds, with its version, the bounds and the command that mends it.
    """
    problems = dict(_problems())
    if problems:
        wanted = " ".join(f'"{requirement}"' for requirement in problems)
        raise ImportError(
            f"proma-trl {version('proma-trl')} works with {', '.join(problems)}, and {', '.join(problems.values())}. "
            f"Run `pip install {wanted}`, or install a release of proma-trl for your versions."
        )


def _problems() -> Iterator[tuple[str, str]]:
    try:
        requirements = [Requirement(text) for text in requires("proma-trl") or ()]
    except PackageNotFoundError:
        return
    for requirement in requirements:
        if requirement.name not in _CHECKED or requirement.marker is not None:
            continue
        bounds = requirement.name + ",".join(sorted(map(str, requirement.specifier), reverse=True))
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield bounds, f"{requirement.name} is not installed"
        else:
            if not requirement.specifier.contains(found, prereleases=True):
                yield bounds, f"{requirement.name} {found} is installed"
