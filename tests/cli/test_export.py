"""tools/export.py: each form says what the run's student says."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, called, refused, run, save_teacher
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from mdistiller.config import load
from mdistiller.dataset import load_dataset
from mdistiller.dataset.imagefolder import CROPS
from mdistiller.models import build_model, fit_inputs
from mdistiller.study import export as exporting
from mdistiller.study.evaluation import evaluate_run, run_to_evaluate
from mdistiller.study.export import KINDS, export, flops_of
from mdistiller.study.export_card import normalised_by, preparation
from mdistiller.study.export_forms import Deployed, write_weights
from mdistiller.study.tables import text_table


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(exporting, "latency_of", lambda infer, inputs: (float(infer(inputs[0]).mean()), 0.0))


@pytest.fixture
def trained(undisturbed, tmp_path, quick):
    return Path(shutil.copytree(undisturbed("KD"), tmp_path / "run"))


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
    assert "of 20 test images" in card and figures["images_compared"] == 20
    assert f"mean ({figures['safetensors_normalised_by']['student']['mean'][0]:.4g}, " in card
    assert {*figures["files"]} == {path.name for path in found.folder.iterdir()} - {"README.md"}
    assert all(f"`{name}`" in card for name in figures["files"])
    assert len({path.stat().st_mode for path in found.folder.iterdir()}) == 1
    assert max(map(len, text_table(found.table).splitlines())) <= 80


def needs(*forms):
    for name in {name for form in forms for name in KINDS[form].needs}:
        pytest.importorskip(name)


def test_onnx_and_int8_as_they_are_asked_for(undisturbed, tmp_path, quick):
    needs("onnx", "int8")
    folder = Path(shutil.copytree(undisturbed("NONE"), tmp_path / "run"))
    said = called("export", folder / "student_latest", "--to", "onnx", "--int8", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    figures = json.loads((folder / "export" / "export.json").read_text())
    eager, onnx, int8 = figures["forms"]
    assert (onnx["form"], int8["form"]) == ("onnx", "int8")
    assert onnx["difference"] < 1e-4 and onnx["top1"] == eager["top1"]
    assert 0 < int8["difference"] < 2 and abs(int8["top1"] - eager["top1"]) < 30
    assert int8["megabytes"] < onnx["megabytes"] / 2
    assert figures["int8_calibrated_on"] == {"split": "train", "images": 40}
    assert "are those on 40 training images" in (folder / "export" / "README.md").read_text()
    names = {"student.onnx", "student.int8.onnx", "student.safetensors", "export.json"}
    assert {*figures["files"]} == names == {path.name for path in (folder / "export").iterdir()} - {"README.md"}


@pytest.mark.slow
def test_openvino(trained, tmp_path):
    needs("openvino")
    found = export(trained / "student_latest", ["openvino"], None)
    assert found.folder == trained / "export" and "student.bin" in found.files
    eager, other, *_ = found.forms
    assert other.difference < 1e-4 and abs(other.top1 - eager.top1) < 1e-6


def test_a_library_s_network_has_the_library_s_flops_and_weights(tmp_path):
    from torchvision import models

    data = SimpleNamespace(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    network = build_model("tv:resnet18", 1000, "imagefolder").eval()
    fit_inputs(network, data.mean, data.std, 64)
    write_weights(network, tmp_path / "x.safetensors")
    theirs = models.resnet18().eval()
    theirs.load_state_dict(load_file(tmp_path / "x.safetensors"))
    image, given = torch.rand(2, 3, 64, 64), normalised_by(network, data)
    mean, std = (torch.tensor(given[key])[:, None, None] for key in ("mean", "std"))
    deployed = Deployed(network, data.mean, data.std)
    wanted = 2e9 * models.ResNet18_Weights.DEFAULT.meta["_ops"]  # torchvision counts a multiplication with an addition
    first = flops_of(deployed, 224)  # of a network that has not run before
    assert first == flops_of(deployed, 224) == pytest.approx(wanted, rel=1e-3)
    with torch.no_grad():
        assert torch.allclose(deployed(image), theirs((image - mean) / std), atol=1e-4)


class Attention(nn.Module):
    """Attention of 2 heads on the pixels of an image, by torch's module and by its function."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, image):
        tokens = image.flatten(2).transpose(1, 2).repeat(1, 1, 3)[..., :8]  # (B, H W, 8)
        seen = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        heads = seen.unflatten(2, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).flatten(1)


def test_flops_have_those_of_attention():
    tokens = 6 * 6
    products = 2 * 2 * tokens * tokens * 8  # of queries and keys, and of what comes of that with values
    layers = 2 * tokens * 8 * (3 * 8 + 8)
    before = torch.backends.mha.get_fastpath_enabled()
    assert flops_of(Deployed(Attention(), (0.5,) * 3, (0.25,) * 3).eval(), 6) == layers + 2 * products
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize("kind", sorted(CROPS))
@pytest.mark.parametrize("words", [[], ["DATASET.SIZE", "40", "DATASET.CROP", "0.7"]])
def test_the_card_says_how_an_image_is_made_of_a_file(tmp_path, kind, words):
    from torchvision.transforms import functional as T

    generator = np.random.default_rng(0)
    for split, name in ((split, name) for split in ("train", "val") for name in ("bird", "fish")):
        (tmp_path / split / name).mkdir(parents=True)
        pixels = generator.integers(0, 256, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / split / name / "0.png")
    cfg = load(None, ["DATASET.TYPE", kind, *words])
    data = load_dataset(kind, tmp_path, cfg.DATASET)
    made = preparation(SimpleNamespace(cfg=cfg), data)
    picture = T.resize(Image.open(tmp_path / "val" / "bird" / "0.png"), made["shorter_side"])
    assert np.array_equal(np.asarray(T.center_crop(picture, made["center_crop"])), data.test_images[:1][0].numpy())


def test_a_teacher_without_a_last_layer_is_left_out(small, tmp_path, quick, capsys):
    file = save_teacher(tmp_path / "seven", "resnet14", 7)
    words = ["DISTILLER.TYPE", "FITNET", "DISTILLER.TEACHER_CKPT", str(file), "DISTILLER.NEW_HEAD", "True"]
    folder = run([*small, *words], tmp_path, SOLVER__EPOCHS=1)
    found = export(folder / "student_best", [], None)
    assert {form.network for form in found.forms} == {"student"}
    assert "without the teacher; the teacher resnet14 has no last layer for these classes" in capsys.readouterr().out
    reports, notes = evaluate_run(run_to_evaluate(folder, [], []), 20, torch.device("cpu"), "none")
    assert [*reports] == ["student, last", "student, best"] and "NEW_HEAD" in notes[0]
    file.unlink()
    assert len(export(folder / "student_best", [], None).forms) == 1


def test_mistakes_are_a_line(trained, tmp_path, monkeypatch):
    with refused(r"nowhere: is no checkpoint in a run's folder \(there is none beside it\); name RUN/student_best"):
        export(tmp_path / "nowhere", ["torch"], None)
    with refused("student_bset: .* student_best, student_latest beside it"):
        export(trained / "student_bset", ["torch"], None)
    with refused(r"run: is a run's folder; name a student in it, .*run/student_best$"):
        export(trained, ["torch"], None)
    with refused("gone.npz: cannot be read .*; point to it with --root PATH"):
        export(trained / "student_best", ["torch"], None, root="gone.npz")
    with refused("--out /dev/null: .* is a file; name a folder of yours"):
        export(trained / "student_best", ["torch"], Path("/dev/null"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "onnx" else None)
    with refused("--to openvino: needs openvino; pip install openvino$"):
        export(trained / "student_best", ["torch", "openvino"], None)
    with refused("--to onnx int8: needs onnxscript onnxruntime; pip install onnxscript onnxruntime$"):
        export(trained / "student_best", ["torch", "onnx", "int8"], None)
    assert not (trained / "export").exists() and (ROOT / "tools/export.py").exists()
