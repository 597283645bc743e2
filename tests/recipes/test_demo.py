import json
import sys

import pytest

from proma_trl.recipes import demo, word_problems


@pytest.mark.parametrize(("after", "succeeds"), [(0.45, False), (0.51, True)])
def test_demo_fails_without_the_rise(tmp_path, monkeypatch, capsys, after, succeeds):
    monkeypatch.setattr(word_problems, "warm_start", lambda *arguments: None)
    monkeypatch.setattr(demo, "train", lambda *arguments: (0.4, after))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(tmp_path)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if succeeds:
        demo.main()
    else:
        with pytest.raises(SystemExit, match="to rise by 10 points"):
            demo.main()
    assert f"{100 * (after - 0.4):+.1f} points" in capsys.readouterr().out
    files = [(tmp_path / "problems" / name).read_text().splitlines() for name in ("train.jsonl", "test.jsonl")]
    train, held_out = ({json.loads(line)["question"] for line in lines} for lines in files)
    assert len(held_out) == word_problems.HELD_OUT >= 200
    assert not train & held_out
