"""The command `proma-trl`: trains policies, compares algorithms, checks models, and demonstrates PROMA."""

import argparse
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
    Launches `proma_trl.recipes.train` with Accelerate. All options are checked here first, before any process starts.

    Options that the recipe does not know are those of `accelerate launch`.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    from .recipes import train as recipe
    from .recipes.training import choose_algorithm, make_parser

    parser = make_parser(recipe.TrainArguments, choose_algorithm(options), recipe.__doc__)
    parser.epilog = (
        "All other options are those of `accelerate launch`, such as --num_processes 2. --accelerate_config takes a "
        f"file of its settings, or a name: {', '.join(names('accelerate'))}."
    )
    try:
        *_, in_file, unknown = parser.parse_args_and_config(
            options, return_remaining_strings=True, separate_remaining_strings=True
        )
        if in_file:
            raise ValueError(f"unknown settings in the file: {' '.join(in_file)}")
        own = without(options, unknown)
        args, *_ = recipe.parse(recipe.TrainArguments, own, recipe.__doc__)
        for name in args.reward_funcs:
            recipe.load_reward(name)
    except ValueError as error:
        parser.error(str(error))
    launch = resolve(unknown, "--accelerate_config", "accelerate")
    launch = ["--config_file" if option == "--accelerate_config" else option for option in launch]
    launch_command(launch_command_parser().parse_args(["--quiet", *launch, "--module", recipe.__name__, *own]))


def compare(options: list[str]) -> None:
    """Runs `proma_trl.recipes.figure2`, which takes the name of one of its files of settings, too."""
    from .recipes import figure2

    figure2.main(resolve(options, "--config", "configs"))


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
