"""benchmarks/first_light.py: whatever happens to a part, the others run, and the page says it."""

import importlib
import json
import os
import sys
import time

from helpers import ROOT


def good(part):
    """Two rows, one of which fails."""
    with part.row("a sum") as cells:
        cells |= {"value": 2.0, "ok": True}
    with part.row("a mistake") as cells:
        raise ValueError("wrong\nmore")


def hangs(part):
    """Never ends."""
    with part.row("before") as cells:
        cells["ok"] = True
    time.sleep(60)


def dies(part):
    """Ends without a word."""
    os._exit(3)


def test_every_part_runs_whatever_the_others_do(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    command = importlib.import_module("first_light")
    parts = {"good": (good, 10, 10), "hangs": (hangs, 1, 1), "dies": (dies, 10, 10), "only CUDA": (good, 10, 0)}
    monkeypatch.setattr(command, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["first_light.py", "--out", str(tmp_path / "out"), "--device", "cpu"])
    command.main()
    found = json.loads((tmp_path / "out" / "first_light.json").read_text())["parts"]
    assert {name: part["state"] for name, part in found.items()} == {
        "good": "failed, 1 of 2 rows", "hangs": "failed", "dies": "failed", "only CUDA": "left out"
    }  # fmt: skip
    firsts = [part["first line"] for part in found.values()]
    assert firsts == ["a mistake: ValueError: wrong", "out of time after 1 s", "exit status 3: ", "needs CUDA"]
    assert found["hangs"]["rows"] == {"before": {"ok": True}}
    page = (tmp_path / "out" / "first_light.md").read_text()
    assert (
        "Not on a GPU" in page
        and "| a sum | 2 |  | yes |" in page
        and "| a mistake |  | ValueError: wrong | **NO** |" in page
    )
    said = capsys.readouterr().out
    assert all(name in said for name in parts) and sorted(p.suffix for p in (tmp_path / "out").iterdir()).count(".log")
