import signal
import sys
import time

import pytest

from proma_trl.recipes.processes import last_step, run_logged


def python(script):
    return [sys.executable, "-c", script]


def test_output_goes_to_the_log(tmp_path, capfd):
    log, looks = tmp_path / "new" / "run.log", []
    script = "import os, sys; print(os.environ['GIVEN'], os.environ['TQDM_DISABLE']); sys.stderr.write('error')"
    run_logged(python(script), log, {"GIVEN": "yes"}, lambda: looks.append(log.exists()))
    assert log.read_text() == "yes 1\nerror"
    assert looks and all(looks)
    assert capfd.readouterr() == ("", "")
    run_logged(python("print('anew')"), log)
    assert log.read_text() == "anew\n"


def test_failure_names_the_command_and_the_log(tmp_path):
    script = "import sys; [print('line', i) for i in range(100)]; sys.exit(3)"
    with pytest.raises(
        RuntimeError, match=r"(?s)-c 'import sys.*exit code 3.*run.log.*line 85\n.*line 99$"
    ) as failure:
        run_logged(python(script), tmp_path / "run.log")
    assert "line 84\n" not in str(failure.value)


def test_an_interrupt_ends_the_process(tmp_path):
    def interrupt():
        if (tmp_path / "begun").exists():
            raise KeyboardInterrupt

    script = f"import pathlib, time; pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(60)"
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_logged(python(script), tmp_path / "run.log", look=interrupt)
    assert time.perf_counter() - start < 30


def test_a_process_that_is_killed(tmp_path):
    with pytest.raises(RuntimeError, match=f"exit code -{int(signal.SIGKILL)}"):
        run_logged(python("import os; os.kill(os.getpid(), 9)"), tmp_path / "run.log")


def test_last_step(tmp_path):
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0, "step": 3}\n{"eval_accuracy": 0.5, "step": 4}\n{"loss": 1')
    assert last_step(tmp_path) == 4
