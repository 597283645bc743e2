"""The command `proma-trl`: trains policies, compares algorithms, checks models, and demonstrates PROMA."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

from . import __version__


@dataclass(frozen=True)
class Command:
    """
    A command, and what it does.

    Attributes:
        help (`str`): One line on it.
        run (`Callable[[list[str]], int | None]`): Takes its options and returns the exit status.
    """

    help: str
    run: Callable[[list[str]], int | None]


def train(options: list[str]) -> None:
    """
    Launches `proma_trl.recipes.train` with Accelerate. What is wrong with options, reward functions and data is said
    here first, before any process starts.

    Options that the recipe does not know are those of `accelerate launch`, and so is all that follows `--`.
    """
    import datasets
    from accelerate.commands.launch import launch_command, launch_command_parser

    from .recipes import train as recipe
    from .recipes.training import choose_algorithm, make_parser

    options, launch_options = split_at_dashes(options)
    parser = make_parser(recipe.TrainArguments, choose_algorithm(options), recipe.__doc__)
    parser.epilog = (
        "Options of `accelerate launch`, such as --num_processes 2, are taken, too; in case of doubt, after --. "
        "--accelerate_config takes a file of its settings, or a name: "
        f"{', '.join(names('accelerate'))}."
    )
    if {"-h", "--help"} & {*options}:
        parser.print_help()
        return
    launcher = launch_command_parser()
    launcher.error = lambda message: parser.error(f"accelerate launch: {message}")
    rest: list[str] = []

    def check_rest(parser, unknown):
        rest.extend(unknown)
        known = {"--accelerate_config", *launcher._option_string_actions}
        foreign = [text for text in unknown if text.startswith("--") and text.split("=")[0] not in known]
        return parser.unknown_options(foreign, known)

    def parse_launch(own):
        launch = resolve([*rest, *launch_options], "--accelerate_config", "accelerate")
        launch = ["--config_file" if option == "--accelerate_config" else option for option in launch]
        parsed = launcher.parse_args(["--quiet", *launch, "--module", recipe.__name__, *own])
        if parsed.training_script != recipe.__name__:
            parser.error(f"unexpected {parsed.training_script!r}: values follow an option's name")
        return parsed

    try:
        args, training_args, model_args = recipe.parse(recipe.TrainArguments, options, recipe.__doc__, check_rest)
        launch = parse_launch(without(options, rest))
        if os.path.exists(args.dataset_name):
            datasets.disable_progress_bars()  # it takes no time
        datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what is wrong is said below
        recipe.prepare(args, training_args, model_args, num_processes(launch))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    launch_command(launch)


def num_processes(launch: argparse.Namespace) -> int:
    """The number of processes that `accelerate launch` starts, as far as its options say."""
    from .recipes.parser import read_settings

    settings = {} if launch.config_file is None else read_settings(launch.config_file, option="--accelerate_config")
    return launch.num_processes or settings.get("num_processes") or 1


def split_at_dashes(options: list[str]) -> tuple[list[str], list[str]]:
    """The options before `--`, and those behind it."""
    place = options.index("--") if "--" in options else len(options)
    return options[:place], options[place + 1 :]


def compare(options: list[str]) -> None:
    """Runs `proma_trl.recipes.figure2`, which takes the name of one of its files of settings, too."""
    from .recipes import figure2
    from .recipes.parser import UsageError

    options = resolve(options, "--config", "configs")
    try:
        if not {"-h", "--help"} & {*options}:
            figure2.check_options(options)
        figure2.main(options)
    except UsageError as error:
        usage = "usage: proma-trl compare [options]; proma-trl compare --help lists them"
        named = ", ".join(name for name in names("configs") if name.startswith("figure2"))
        named = f" Files by name: {named}." if "there is no file" in str(error) else ""
        print(f"{usage}\nproma-trl compare: error: {error}{named}", file=sys.stderr)
        raise SystemExit(2) from error


def check(options: list[str]) -> int:
    """Runs `proma_trl.check`."""
    from .check import main

    return main(options)


def demo(options: list[str]) -> None:
    """Runs `proma_trl.recipes.demo`."""
    from .recipes import demo

    demo.main(options)


COMMANDS = {
    "train": Command("train a policy on any prompts with any reward functions", train),
    "compare": Command("train with several algorithms and seeds, and draw how they compare", compare),
    "check": Command("say whether PROMA trains a model, and how its layers are followed", check),
    "demo": Command("train a small policy in minutes, on a CPU and without network", demo),
}


def names(folder: str) -> list[str]:
    """Names of the settings that come with the recipes, in `configs` or `accelerate`."""
    found = files("proma_trl.recipes").joinpath(folder).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in found)


def resolve(options: list[str], option: str, folder: str) -> list[str]:
    """Puts a file's path in place of its name, where an option names settings that come with the recipes."""
    resolved = [part for text in options for part in (text.split("=", 1) if text.startswith(f"{option}=") else [text])]
    for i, text in enumerate(resolved[:-1]):
        if text == option and resolved[i + 1] in names(folder):
            resolved[i + 1] = str(files("proma_trl.recipes").joinpath(folder, f"{resolved[i + 1]}.yaml"))
    return resolved


def without(options: list[str], removed: list[str]) -> list[str]:
    """The options without those of `removed`, which are among them in the same order."""
    left, waiting = [], list(removed)
    for option in options:
        if waiting and option == waiting[0]:
            waiting.pop(0)
        else:
            left.append(option)
    return left


def main(arguments: list[str] | None = None) -> int:
    """
    The entry point of `proma-trl`.

    Args:
        arguments (`list[str]`, *optional*): What stands behind `proma-trl`; by default `sys.argv[1:]`.

    Returns:
        `int`: The exit status.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="proma-trl", description=__doc__)
    parser.add_argument("--version", action="version", version=f"proma-trl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    name = parser.parse_args(arguments[:1]).command
    sys.argv[0] = f"proma-trl {name}"  # what the command's own help and errors begin with
    return COMMANDS[name].run(arguments[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
