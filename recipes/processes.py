"""Scripts in processes of their own: what they print goes to a log file, and `metrics.jsonl` says how far they are."""

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

SECONDS_BETWEEN_LOOKS = 0.5


def run_logged(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    look: Callable[[], None] = lambda: None,
) -> None:
    """
    Runs a command to its end, with all of its output in a file.

    Args:
        command (`Sequence[str]`): The program and its arguments.
        log (`Path`): The file, which is written anew.
        environment (`Mapping[str, str]`, *optional*): Variables beside those of this process.
        look (`Callable[[], None]`, *optional*): Called again and again until the command has ended, and once then.

    Raises:
        RuntimeError: The command failed. The message has its last lines, and says where the others are.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # Waiting threads sleep: if they spin, programs on the same cores slow each other down many times over. In a file,
    # a progress bar would be a line for each time that it moves
    variables = {"OMP_WAIT_POLICY": "passive", **os.environ, "TQDM_DISABLE": "1", **(environment or {})}
    with (
        log.open("w") as output,
        subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            while process.poll() is None:
                look()
                try:
                    process.wait(SECONDS_BETWEEN_LOOKS)
                except subprocess.TimeoutExpired:
                    pass
        except BaseException:
            process.kill()
            raise
    look()
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(
            f"{shlex.join(command)}\nended with exit code {process.returncode}. All of its output is in {log}, which "
            f"ends with:\n{tail}"
        )


def run_with_progress(
    command: Sequence[str], folder: Path, steps: int, log: Path, environment: Mapping[str, str] | None = None
) -> None:
    """
    Runs a training script as [`run_logged`] does, with one line that shows its progress where a person watches.

    Args:
        folder (`Path`): The script's output folder, where it writes `metrics.jsonl`.
        steps (`int`): The optimizer steps that it will take.

    Raises:
        RuntimeError: The script failed.
    """
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    # `disable=None`: in a file, there is no line that could change
    with tqdm(total=steps, unit="step", leave=False, dynamic_ncols=True, disable=None) as bar:

        def show() -> None:
            bar.update(last_step(folder) - bar.n)
            bar.refresh()  # the clock goes on while a script is still being loaded

        run_logged(command, log, environment, show)


def last_step(folder: Path) -> int:
    """The last optimizer step in a run's `metrics.jsonl`, 0 where there is none yet."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [re.search(r'"step": (\d+)', line) for line in lines[-2:]]
    return max((int(match[1]) for match in found if match), default=0)
