"""tools/export.py: each form says what the run's student says."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import ROOT, refused, run
from safetensors.torch import load_file

from mdistiller.study import export as exporting
from mdistiller.study.export import NEEDS, export

OPTIONAL = ["onnx", "openvino", "int8"]


@pytest.fixture
def trained(small, tmp_path, monkeypatch):
    monkeypatch.setattr(
        exporting, "latency_of", lambda infer, data, batch: (float(infer(batch_of(data, batch)).mean()), 0.0)
    )
    return run([*small, "DISTILLER.TYPE", "KD"], tmp_path)


def batch_of(data, count):
    return exporting.pixels(data.test_images[:count])


def test_the_torch_form_and_what_lies_beside_it(trained, tmp_path):
    found = export(trained / "student_best", ["torch"], tmp_path / "out")
    assert {path.name for path in found.folder.iterdir()} == {
        "README.md", "export.json", "student.pt2", "student.safetensors", "teacher.pt2", "teacher.safetensors",
    }  # fmt: skip
    eager, program, *_ = found.forms
    assert program.difference == 0 and program.top1 == eager.top1
    best = torch.load(trained / "student_best", weights_only=True)
    assert eager.top1 == pytest.approx(best["acc"]), "the accuracy of the run's own evaluation"
    weights = load_file(tmp_path / "out" / "student.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in best["model"].items())
    figures = json.loads((tmp_path / "out" / "export.json").read_text())
    assert figures["parameters"]["student"] == sum(
        v.numel() for k, v in weights.items() if "running" not in k and "num_b" not in k
    )
    assert figures["flops"]["teacher"] > figures["flops"]["student"] > 1e6
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# resnet8 for npz" in card and "distilled from resnet14 by KD" in card and "| torch" in card
    assert max(map(len, exporting.text_of(found).splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("form", OPTIONAL)
def test_other_forms(trained, tmp_path, form):
    for name in NEEDS[form]:
        pytest.importorskip(name)
    found = export(trained / "student_latest", [form], None)
    assert found.folder == trained / "export"
    eager, other, *_ = found.forms
    assert other.difference < (2.0 if form == "int8" else 1e-4)
    assert abs(other.top1 - eager.top1) < (30 if form == "int8" else 1e-6)


def test_mistakes_are_a_line(trained, tmp_path, monkeypatch):
    with refused(r"nowhere: is no checkpoint in a run's folder \(there is none beside it\); name RUN/student_best"):
        export(tmp_path / "nowhere", ["torch"], None)
    with refused("student_bset: .* student_best, student_latest beside it"):
        export(trained / "student_bset", ["torch"], None)
    with refused("gone.npz: cannot be read .*; point to it with --root PATH"):
        export(trained / "student_best", ["torch"], None, root="gone.npz")
    with refused("--out /dev/null: .* is a file; name a folder of yours"):
        export(trained / "student_best", ["torch"], Path("/dev/null"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with refused("--to onnx: needs .*onnxruntime; pip install"):
        export(trained / "student_best", ["onnx"], None)
    assert not (trained / "export").exists() and (ROOT / "tools/export.py").exists()
