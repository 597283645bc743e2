"""The parser of the recipes: settings from a YAML file and from the command line, and a sentence for what is wrong."""

import argparse
import difflib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NoReturn

import yaml
from trl import TrlParser

# What YAML 1.1 takes for a boolean, as choices call it
_OFF, _ON = ("no", "off", "false", "none"), ("yes", "on", "true")


class UsageError(ValueError):
    """Settings are refused: what is wrong is not the program."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every option, and the description's lines as they are."""


class RecipeParser(TrlParser):
    """
    TRL's parser, whose errors take a few lines: one of usage, and one for each setting that is wrong.

    In a YAML file, a value that stands where a list is expected is a list of one, and `no` stands for `"no"` where
    that is among the choices.
    """

    def __init__(self, dataclass_types: type | Iterable[type], **kwargs: Any):
        kwargs = {
            "usage": "%(prog)s [options]; %(prog)s --help lists them",
            "formatter_class": HelpFormatter,
            **kwargs,
        }
        super().__init__(dataclass_types, **kwargs)
        # TrlParser reads the file itself, before argparse sees the option. This is for --help.
        self.add_argument(
            "--config", help="A YAML file with any of these options; the command line wins.", default=argparse.SUPPRESS
        )
        self.parsed: tuple[Any, ...] = ()
        self._file: str | None = None
        self._texts: dict[str, Any] = {}
        self._passes_on = False
        self._problems: list[str] = []

    def parse_args_and_config(
        self,
        args: Sequence[str],
        return_remaining_strings: bool = False,
        check_rest: Callable[[list[str]], list[str]] | None = None,
    ) -> tuple[Any, ...]:
        """
        Parses options, as TrlParser does.

        Args:
            args (`Sequence[str]`): The options.
            return_remaining_strings (`bool`): Whether settings that are unknown come last in what is returned, those
                of the file as options, too. Otherwise they are refused.
            check_rest (`Callable`, *optional*): Says what is wrong with options that are unknown here.

        Raises:
            SystemExit: For an option or a value that argparse refuses.
            UsageError: For all other settings that are refused, with a line for each. `parsed` has the dataclasses
                that did not refuse theirs, and `None` for each of the others.
        """
        args = split_assignment(args, "--config")
        self._problems, self._passes_on = [], return_remaining_strings
        if "--config" in args:
            place = args.index("--config") + 1
            if place == len(args):
                self.error("--config: expected a file")
            self._file = args[place]
            self._texts = read_settings(self._file, yaml.BaseLoader)
        kinds = self.dataclass_types
        # So that one that refuses its settings does not hide what others would say
        self.dataclass_types = [_Collected(kind, self._problems) for kind in kinds]
        try:
            *parsed, in_file, rest = super().parse_args_and_config(
                args, return_remaining_strings=True, separate_remaining_strings=True
            )
        finally:
            self.dataclass_types = kinds
        self.parsed = tuple(parsed)
        if not return_remaining_strings:
            self._problems += (check_rest or self.unknown_options)(rest)
        if self._problems:
            raise UsageError("\n".join(self._problems))
        return (*parsed, in_file + rest) if return_remaining_strings else self.parsed

    def unknown_options(self, rest: Sequence[str], more: Collection[str] = ()) -> list[str]:
        """Sentences on options that are unknown. `more` are options that would be known, too."""
        known = {option: None for option in (*self._option_string_actions, *more) if "-" not in option[2:]}
        problems = [unknown("option", text.split("=")[0], known) for text in rest if text.startswith("--")]
        return problems or [f"unexpected {text!r}: values follow an option's name." for text in rest[:1]]

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        """Takes the file's settings as defaults. Those that are unknown or of the wrong kind are kept for the end."""
        actions = {action.dest: action for action in self._actions if action.dest not in ("config", "help")}
        for name in list(settings):
            if name not in actions:
                if not self._passes_on:
                    self._problems.append(f"{self._file}: {unknown('setting', name, actions)}")
                    del settings[name]
                continue
            try:
                settings[name] = _as_expected(actions[name], settings[name], self._texts[name])
            except (ValueError, argparse.ArgumentTypeError) as error:
                self._problems.append(f"{self._file}: `{name}: {_shown(self._texts[name])}`: {error}")
                del settings[name]
        return super().set_defaults_with_config(**settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"usage: {self.format_usage().removeprefix('usage: ').strip()}\n{self.prog}: error: {message}\n")


class _Collected:
    """A dataclass in whose place an error of its own checks is noted."""

    def __init__(self, kind: type, problems: list[str]):
        self.kind, self.problems = kind, problems
        self.__dataclass_fields__ = kind.__dataclass_fields__

    def __call__(self, **settings: Any) -> Any:
        try:
            return self.kind(**settings)
        except ValueError as error:
            self.problems.append(str(error))
            return None


def read_settings(path: str, loader: type = yaml.SafeLoader, option: str = "--config") -> dict[str, Any]:
    """
    Reads a YAML file of settings.

    Args:
        path (`str`): The file.
        option (`str`): The option that names it.
        loader (`type`): PyYAML's loader; with `yaml.BaseLoader`, values are the texts that stand in the file.

    Raises:
        UsageError: If there is no such file, or it is no YAML mapping, with its name and the line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.load(file, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not valid YAML ({error.problem}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML ({str(error).splitlines()[0]}).") from error
    except OSError as error:
        raise UsageError(f"{option}: there is no file {path!r} that can be read ({error.strerror}).") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: not a file of settings, which has lines such as `learning_rate: 1.0e-6`.")
    return settings


def _shown(text: Any) -> str:
    return f"[{', '.join(map(_shown, text))}]" if isinstance(text, list) else str(text)


def unknown(kind: str, name: str, known: Collection[str]) -> str:
    """A sentence on a name that is unknown, with the nearest one that is known."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"unknown {kind} `{name}`{f'; did you mean `{near[0]}`?' if near else '.'}"


def split_assignment(options: Sequence[str], option: str) -> list[str]:
    """The options, with `--option=value` as two."""
    return [part for text in options for part in (text.split("=", 1) if text.startswith(f"{option}=") else [text])]


def _as_expected(action: argparse.Action, value: Any, text: Any) -> Any:
    """A value of a YAML file as the option's kind. `text` is what stands in the file."""
    if value is None:
        return value
    if action.nargs == "+":
        values, texts = (value, text) if isinstance(value, list) else ([value], [text])
        return [_one(action, element, written) for element, written in zip(values, texts, strict=True)]
    if isinstance(value, list) and action.type in (int, float):
        raise ValueError("takes one value, not a list.")
    return _one(action, value, text)


def _one(action: argparse.Action, value: Any, text: Any) -> Any:
    kind = action.type
    if action.choices is not None:
        return _choice(action.choices, value, text)
    if isinstance(value, bool) and kind is str:
        # Norway's language is no boolean
        return value if text.lower() in ("true", "false") or action.dest in _ALSO_BOOLEAN else text
    if kind not in _KINDS:
        return text if kind is str and action.nargs == "+" and not isinstance(value, str) else value
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"must be {_KINDS[kind]}.") from None


_KINDS = {int: "a whole number", float: "a number"}
# Settings that take texts or booleans
_ALSO_BOOLEAN = ("scale_rewards", "fsdp", "resume_from_checkpoint")


def _choice(choices: Collection[Any], value: Any, text: Any) -> Any:
    if value in choices:
        return value
    for meant in (_ON if value else _OFF) if isinstance(value, bool) else ():
        if meant in choices:
            return meant
    raise ValueError(f"must be one of {', '.join(map(str, choices))}.")
