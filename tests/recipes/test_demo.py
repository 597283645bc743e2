"""What the demo shows in a terminal and in a file, and that it fails where it should."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import get_args

import pytest
import yaml
from support.recipe import ROOT

from proma_trl.recipes import demo, training, word_problems

# In place of the two scripts: leave what those leave
TASK = """
import json, os, pathlib, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(options["--output_dir"])
(folder / "problems").mkdir(parents=True)
(folder / "warm_start").mkdir()
problem = {"question": "Ann has 4 coins. " * 8 + "How many?", "answer": "4 + 1 = 5\\n#### 5"}
(folder / "problems" / "train.jsonl").write_text(json.dumps(problem))
(folder / "warm_start" / "metrics.jsonl").write_text(json.dumps({"loss": 1.0, "step": 100}))
time.sleep(0.8)
print("what the warm start prints", os.environ["HF_HUB_OFFLINE"])
"""
RECIPE = """
import json, pathlib, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["--seed"] == "3" and options["--dataset_name"].endswith("problems")
folder = pathlib.Path(options["--output_dir"])
folder.mkdir()
for step, accuracy in ((0, 0.4), (5, 0.47), (10, AFTER)):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"eval_accuracy": accuracy, "step": step}) + "\\n")
    time.sleep(0.2)
print("what the training prints")
sys.exit(STATUS)
"""
CALL = "import sys; from proma_trl.recipes import demo, word_problems; "
CALL += "word_problems.__file__, demo.RECIPE, *options = sys.argv[1:]; demo.main(options)"


def write_stubs(tmp_path, after=0.9, status=0):
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "recipe.py").write_text(RECIPE.replace("AFTER", str(after)).replace("STATUS", str(status)))
    return str(tmp_path / "task.py"), str(tmp_path / "recipe.py")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """As where a virtual environment is active."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run_demo(**settings):
        task, recipe = write_stubs(tmp_path, **settings)
        monkeypatch.setattr(word_problems, "__file__", task)
        monkeypatch.setattr(demo, "RECIPE", recipe)
        monkeypatch.chdir(tmp_path)
        demo.main(["--seed", "3"])

    return run_demo


def test_in_a_file(run, tmp_path, capsys):
    run()
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert len(lines) < 50 and max(map(len, lines)) <= 80 and "\r" not in printed.out
    assert [line[:3] for line in lines if re.match(r"\d/\d", line)] == ["1/2", "2/2"]
    # The chart: a frame with its axes
    assert any(line.startswith("100┤") for line in lines) and any(line.startswith("  0┤") for line in lines)
    assert "after proma                  90.0%" in printed.out and "   +50.0 points" in printed.out
    assert "Saved the policy, its model card and metrics.jsonl in runs/demo/proma\n" in printed.out
    logs = re.findall(r"All output: (\S+)", printed.out)
    assert [(tmp_path / log).read_text() for log in logs] == [
        "what the warm start prints 1\n",
        "what the training prints\n",
    ]
    for command in ("proma-trl train --", "proma-trl compare --config figure2_cpu", 'python -c "import json\n'):
        assert command in printed.out


def test_in_a_terminal(tmp_path):
    """80 columns wide: each phase has one line that is drawn again and again, and is gone in the end."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-c", CALL, *write_stubs(tmp_path), "--seed", "3"]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=inside, stdout=inside, stderr=inside)
    os.close(inside)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # how Linux says that a terminal's other end is closed
        pass
    os.close(terminal)
    assert process.wait() == 0
    lines = shown.decode().replace("\r\n", "\n").split("\n")
    bars = [[part for part in line.split("\r") if "step/s" in part] for line in lines]
    drawn = [parts for parts in bars if parts]
    assert len(drawn) == 2 and all(len(parts) > 1 for parts in drawn)
    assert "100/313 [" in drawn[0][-1] and "10/30 [" in drawn[1][-1]
    assert max(len(part) for line in lines for part in line.split("\r")) <= 80
    assert len(lines) < 50


@pytest.mark.parametrize(("after", "succeeds"), [(0.45, False), (0.51, True)])
def test_fails_without_the_rise(run, capsys, after, succeeds):
    if succeeds:
        run(after=after)
    else:
        with pytest.raises(SystemExit, match="to rise by 10 points"):
            run(after=after)
    printed = capsys.readouterr().out
    assert f"{100 * (after - 0.4):+.1f} points" in printed
    assert ("Try next" in printed) == succeeds


def test_failure_shows_the_end_of_the_log(run):
    with pytest.raises(SystemExit, match=r"(?s)exit code 7.*runs/demo/proma.log.*what the training prints"):
        run(status=7)


def test_commands_where_nothing_is_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    text = demo.next_commands(Path("runs/demo/proma"), Path("runs/demo/problems"))
    assert len(re.findall(r"^\.venv/bin/(?:python -c|proma-trl) ", text, re.MULTILINE)) == 3
    assert max(map(len, text.splitlines())) <= 80


def test_without_plotext(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotext", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert demo.draw({0: 0.1, 5: 0.2}) == "For a chart here: pip install 'proma-trl[figures]'"


def test_it_starts_at_once():
    """The processes that train load torch; this one knows the algorithms without it."""
    script = "import sys; from proma_trl.recipes import demo; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"
    assert set(demo.ALGORITHMS) == set(get_args(training.Algorithm))


@pytest.mark.slow
def test_the_real_demo(tmp_path):
    """Both scripts, on a task a fraction of the size: nothing is announced, and the policy that is saved answers."""
    (tmp_path / "task.py").write_text(
        "import sys\nfrom proma_trl.recipes import word_problems\n"
        "word_problems.WARM_START, word_problems.TRAIN, word_problems.HELD_OUT = 256, 64, 40\n"
        "word_problems.main(sys.argv[1:])\n"
    )
    settings = yaml.safe_load(demo.SETTINGS.read_text()) | {"max_steps": 2, "gradient_accumulation_steps": 2}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings | {"eval_every": 1}))
    tiny = "from pathlib import Path; from proma_trl.recipes import demo; demo.REQUIRED_RISE = -1; "
    tiny += "demo.SETTINGS = Path('settings.yaml'); "
    command = [sys.executable, "-c", tiny + CALL, "task.py", str(ROOT / "recipes" / "gsm8k.py")]
    with open(tmp_path / "demo.log", "w") as log:
        status = subprocess.run(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT).returncode
    printed = (tmp_path / "demo.log").read_text()
    assert status == 0, printed
    assert len(printed.splitlines()) < 50 and max(map(len, printed.splitlines())) <= 80
    logs = [(tmp_path / log).read_text() for log in re.findall(r"All output: (\S+)", printed)]
    assert len(logs) == 2 and "eval_accuracy" in logs[1]
    for text in (printed, *logs):
        assert not re.search("deprecat|FutureWarning", text, re.IGNORECASE), text
        assert "\r" not in text
    ask = re.search(r'^\S*python -c ".*?"$', printed, re.MULTILINE | re.DOTALL)[0]
    answer = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True)
    held_out = json.loads((tmp_path / "runs" / "demo" / "problems" / "test.jsonl").read_text().splitlines()[0])
    assert answer.stdout.startswith(held_out["question"] + " "), answer.stderr
