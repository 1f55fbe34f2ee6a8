import argparse
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict
from mdistiller.runs import checkpoint


def model(name="resnet8", classes=10):
    torch.manual_seed(0)
    return cifar_model_dict[name][0](num_classes=classes)


FORMS = {
    "mdistiller": lambda s: {"model": s, "epoch": 240, "best_acc": np.float64(72.3)},
    "float32 scalar": lambda s: {"model": s, "accuracy": np.float32(72.3)},
    "RepDistiller": lambda s: {"opt": argparse.Namespace(lr=0.05), "model": s, "optimizer": {"state": {}}},
    "parallel": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "state_dict": lambda s: {"state_dict": s},
    "bare": lambda s: s,
    "distiller": lambda s: {"model": {f"student.{k}": v for k, v in s.items()} | {"teacher.fc.weight": torch.ones(2)}},
    "parallel distiller": lambda s: {"model": {f"module.student.{k}": v for k, v in s.items()}},
    "old": lambda s: {"model": {k: v for k, v in s.items() if "num_batches" not in k}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_form_of_checkpoint_loads(tmp_path, form, legacy):
    source, target = model(), model()
    for p in target.parameters():
        p.data.zero_()
    torch.save(FORMS[form](source.state_dict()), tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    checkpoint.load_weights(target, "resnet8", 10, tmp_path / "x.pth")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_scalars_of_either_numpy_load(tmp_path, module):
    torch.save(
        {"model": model().state_dict(), "acc": np.float64(1)}, tmp_path / "x", _use_new_zipfile_serialization=False
    )
    data = (tmp_path / "x").read_bytes()
    found = next(name for name in (b"numpy.core.multiarray", b"numpy._core.multiarray") if name + b"\n" in data)
    (tmp_path / "x").write_bytes(data.replace(found + b"\n", module + b"\n"))
    assert checkpoint.load(tmp_path / "x")["acc"] == 1


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


@pytest.mark.parametrize(
    "wrap", [lambda b: b, lambda b: {"model": b}, lambda b: {"model": model().state_dict(), "x": b}]
)
def test_nothing_in_a_checkpoint_runs(tmp_path, monkeypatch, wrap):
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(Bomb()), "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps(wrap(Bomb())))
    for name in ("x.pth", "y.pth"):
        with pytest.raises(UserError, match=name) as caught:
            checkpoint.load(name)
        assert len(caught.value.lines) == 1
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("keep", [0, 1, 10, 100, 1000, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path, keep):
    torch.save({"model": model().state_dict()}, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "x.pth").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"x\.pth"):
        checkpoint.load(tmp_path / "x.pth")


def test_other_files_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("data.pkl", "x")
    (tmp_path / "b").mkdir()
    torch.save([1, 2], tmp_path / "c")
    for name in ("a.zip", "b", "c", "gone"):
        with pytest.raises(UserError, match=name):
            checkpoint.load(tmp_path / name)
    torch.save({"model": {"a": 1}}, tmp_path / "d")
    with pytest.raises(UserError, match="holds no weights"):
        checkpoint.load_weights(model(), "resnet8", 10, tmp_path / "d")


def test_a_misfit_names_both_sides(tmp_path):
    torch.save({"model": model("resnet20", 100).state_dict()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="holds resnet20 with 100 classes, but resnet8 with 10 classes is wanted"):
        checkpoint.load_weights(model(), "resnet8", 10, tmp_path / "x.pth")
    torch.save({"model": {"w": torch.ones(3, 3)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no architecture of the zoo"):
        checkpoint.load_weights(model(), "resnet8", 10, tmp_path / "x.pth")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = model().state_dict()
    state["fc.weight"][3, 3] = float("nan")
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"fc\.weight"):
        checkpoint.load_weights(model(), "resnet8", 10, tmp_path / "x.pth")


@pytest.mark.parametrize("name", cifar_model_dict)
def test_the_zoo_is_told_apart(name):
    with torch.device("meta"):
        state = cifar_model_dict[name][0](num_classes=23).state_dict()
    assert checkpoint.identify(state) == (name, 23)
