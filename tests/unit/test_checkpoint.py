"""Checkpoints of this field load whatever wraps their weights; everything else is one line that says why."""

import argparse
import pickle
import random
import tarfile
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Bomb, refused, same
from methods import model
from torch import nn

from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict
from mdistiller.runs import checkpoint


@pytest.fixture
def small_zoo(monkeypatch):
    """A zoo of three, which is looked through in no time."""
    zoo = {name: cifar_model_dict[name] for name in ("vgg8", "resnet20", "resnet8")}
    monkeypatch.setattr(checkpoint, "cifar_model_dict", SimpleNamespace(active=zoo))


FORMS = {
    "mdistiller": lambda s: {"model": s, "epoch": 240, "best_acc": np.float64(72.3)},
    "float32 scalar": lambda s: {"model": s, "accuracy": np.float32(72.3)},
    "RepDistiller": lambda s: {"opt": argparse.Namespace(lr=0.05), "model": s, "optimizer": {"state": {}}},
    "parallel": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "state_dict": lambda s: {"state_dict": s},
    "bare": lambda s: s,
    "distiller": lambda s: {"model": {f"student.{k}": v for k, v in s.items()} | {"teacher.fc.weight": torch.ones(2)}},
    "parallel distiller": lambda s: {"model": {f"module.student.{k}": v for k, v in s.items()}},
    "net": lambda s: {"net": s, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}}},
    "nested": lambda s: {"checkpoint": {"model_state_dict": s, "epoch": 3}},
    "compiled": lambda s: {"model": {f"_orig_mod.{k}": v for k, v in s.items()}},
    "compiled and parallel": lambda s: {"module": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "a trainer's": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 3},
    "a distiller of twins": lambda s: {
        "net": {f"{side}.{k}": v * (side == "student") for side in ("teacher", "student") for k, v in s.items()}
    },
    "beside its mean": lambda s: {"model": s, "ema": {k: 0 * v for k, v in s.items()}},
    "old": lambda s: {"model": {k: v for k, v in s.items() if "num_batches" not in k}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_form_of_checkpoint_loads(tmp_path, form, legacy):
    source, target = model(), model()
    target.apply(lambda module: [p.data.zero_() for p in module.parameters()])
    torch.save(FORMS[form](source.state_dict()), tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    checkpoint.load_weights(target, "resnet8", 10, tmp_path / "x.pth")
    assert same(dict(source.named_parameters()), dict(target.named_parameters()))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_scalars_of_either_numpy_load(tmp_path, module):
    torch.save(
        {"model": model().state_dict(), "acc": np.float64(1)}, tmp_path / "x", _use_new_zipfile_serialization=False
    )
    data = (tmp_path / "x").read_bytes()
    found = next(name for name in (b"numpy.core.multiarray", b"numpy._core.multiarray") if name + b"\n" in data)
    (tmp_path / "x").write_bytes(data.replace(found + b"\n", module + b"\n"))
    assert checkpoint.load(tmp_path / "x")["acc"] == 1


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_checkpoint_runs(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    for state in (Bomb(), {"model": Bomb()}, {"model": model().state_dict(), "x": [[{"y": Bomb()}]]}):
        torch.save(state, "x.pth", _use_new_zipfile_serialization=not legacy)
        (tmp_path / "y.pth").write_bytes(pickle.dumps(state))
        for name in ("x.pth", "y.pth"):
            with refused(name):
                checkpoint.load(name)
    assert not (tmp_path / "bomb").exists()


def check_refused(path, says):
    with refused(says) as caught:
        checkpoint.load_weights(model(), "resnet8", 10, path)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 10, 1000, 0.5, 0.99, 0.9999])
def test_truncated_files_are_named(tmp_path, keep, legacy):
    torch.save({"model": model().state_dict()}, tmp_path / "whole", _use_new_zipfile_serialization=not legacy)
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "x.pth").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    check_refused(tmp_path / "x.pth", "damaged")


@pytest.mark.usefixtures("small_zoo")
@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_bytes_are_refused_or_give_finite_weights(tmp_path, legacy):
    file, network, refused = tmp_path / "x.pth", model(), []
    torch.save({"model": network.state_dict(), "epoch": 3}, file, _use_new_zipfile_serialization=not legacy)
    data = file.read_bytes()
    for seed in range(40):
        rng, damaged = random.Random(seed), bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            # anywhere, among the first bytes (pickles), or among the last (the zip's directory)
            start, stop = rng.choice(((0, len(data)), (0, 12_000), (len(data) - 9000, len(data))))
            damaged[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            checkpoint.load_weights(network, "resnet8", 10, file)
        except UserError as error:
            refused.append(error.lines)
        else:
            assert all(value.isfinite().all() for value in network.state_dict().values())
    assert 10 < len(refused) < 40
    assert all(len(lines) == 1 and "x.pth" in lines[0] for lines in refused)


def test_a_checksum_tells_damage(tmp_path):
    checkpoint.save({"model": model().state_dict()}, tmp_path / "x", tmp_path / "y")
    assert checkpoint.load(tmp_path / "y").keys() == {"model"}
    state = torch.load(tmp_path / "x", weights_only=True)
    state["model"]["fc.bias"][0] += 1
    torch.save(state, tmp_path / "x")
    check_refused(tmp_path / "x", "checksum")


def archive(path):
    """A zip file, as a .pt2 is."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", "x")


def script(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def half(path):
    torch.save(model().state_dict(), path)
    path.write_bytes(path.read_bytes()[:9000])


def content(data):
    return lambda path: path.write_bytes(data)


PICKLED = r"pickled mdistiller.models.resnet.ResNet, .*state_dict\(\), 'weights.pth'\)"
PACKED = "is an archive, no checkpoint; unpack it .* tools/download.py teachers --from"
DEPLOYED = "is no checkpoint but a network to deploy; take the .safetensors beside it"
SAFE = content((60).to_bytes(8, "little") + b'{"fc.weight":{"dtype":"F32"')
OTHER = {  # {name: (what makes the file, what the refusal says)}
    "gone": (lambda path: None, "checkpoint"),
    "b": (lambda path: path.mkdir(), "checkpoint"),
    "a.zip": (archive, "checkpoint"),
    "text": (content(b"text"), "checkpoint"),
    "deep": (content(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), "checkpoint"),
    "s.pth": (SAFE, "is a file of safetensors; give it a name that ends so, s.safetensors"),
    "page.pth": (content(b"<!DOCTYPE html>\n<p>404"), "text, '<!DOCTYPE html> ...'; fetch the file itself"),
    "pointer.pth": (content(b"version https://git-lfs.github.com/spec/v1\n"), "text, 'version https://git-lfs"),
    "script.pth": (script, "TorchScript; do torch.save.torch.jit.load.'script.pth'"),
    "half.pth": (half, "is damaged"),
    "junk.pth": (content(b"\x01" * 100), "is damaged"),
    "zip.pth": (lambda path: torch.save(model(), path), PICKLED),
    "pickle.pth": (lambda path: torch.save(model(), path, _use_new_zipfile_serialization=False), PICKLED),
    "x.tar": (lambda path: tarfile.open(path, "w:gz").close(), PACKED),
    "x.zip": (archive, PACKED),
    "student.pt2": (archive, DEPLOYED),
    "student.onnx": (archive, DEPLOYED),
    "student.int8.onnx": (archive, DEPLOYED),
    "student.xml": (archive, DEPLOYED),
}


@pytest.mark.parametrize("name", OTHER)
def test_files_of_other_kinds_are_named(tmp_path, name):
    make, says = OTHER[name]
    make(tmp_path / name)
    said = check_refused(tmp_path / name, says)
    assert "weights_only" not in said or says is PICKLED, "torch's advice is on its own call"


def cyclic():
    state = {}
    state["model"] = state
    return state


def weight(change, key="fc.weight"):
    """A checkpoint with one weight changed."""
    state = model().state_dict()
    return {"model": state | {key: change(state[key])}}


# {kind: (what is saved, what the refusal says)}
ODD = {
    "other architecture": (
        lambda: {"model": model("resnet20", 100).state_dict()},
        "holds resnet20 with 100 classes, but resnet8 with 10 classes is wanted",
    ),
    "several": (
        lambda: {"net": model().state_dict(), "mean": {"ema": model().state_dict()}},
        "several weights that fit resnet8 with 10 classes: net, mean.ema; store the wanted",
    ),
    "fewer classes": (
        lambda: {"net": weight(lambda w: w[:7])["model"], "epoch": 3, "optimizer": {}},
        r"keys net, epoch, optimizer.*does not fit: fc.weight is \(7, 64\), not \(10, 64\)",
    ),
    "no architecture": (lambda: {"model": {"w": torch.ones(3, 3)}}, "no architecture of the zoo"),
    "a key less": (lambda: {"model": dict(list(model().state_dict().items())[:-1])}, "no architecture"),
    "a key of two lines": (lambda: {"model": model().state_dict() | {"a\nb": torch.ones(3)}}, "no architecture"),
    "classes beyond counting": (lambda: {"model": {"fc.weight": torch.ones(2**61, 0)}}, "no architecture"),
    "NaN": (lambda: weight(lambda w: w * torch.nan), r"fc\.weight"),
    "infinite statistics": (lambda: weight(lambda w: w + torch.inf, "bn1.running_var"), "bn1.running_var"),
    "beyond float32": (lambda: weight(lambda w: w.double() + 1e300), "fc.weight"),
    "whole numbers": (lambda: weight(lambda w: w.long()), "int64, expected"),
    "complex": (lambda: weight(lambda w: w.to(torch.complex64)), "complex64, expected"),
    "quantized": (lambda: weight(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)), "fc.weight"),
    "sparse": (lambda: weight(lambda w: w.to_sparse()), "sparse"),
    "without data": (lambda: weight(lambda w: w.to("meta")), "without data"),
    "nested": (lambda: weight(lambda w: torch.nested.nested_tensor([w[0], w[1, :3]])), "nested"),
    "a tera by stride 0": (lambda: weight(lambda w: torch.ones(1, 64).expand(10**12, 64)), "no architecture"),
    "a list": (lambda: [1, 2], "holds a list"),
    "no tensors": (lambda: {"model": {"a": 1}}, "holds no weights"),
    "nothing": (dict, "holds no weights"),
    "itself": (cyclic, "holds no weights"),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of its kinds of tensors
@pytest.mark.usefixtures("small_zoo")
@pytest.mark.parametrize("kind", ODD)
def test_what_does_not_fit_is_named(tmp_path, kind):
    state, says = ODD[kind]
    torch.save(state(), tmp_path / "x.pth")
    check_refused(tmp_path / "x.pth", says)


def test_the_zoo_is_told_apart():
    seen = {}
    for name, (constructor, _) in cifar_model_dict.active.items():
        with torch.device("meta"):
            state = constructor(num_classes=23).state_dict()
        assert seen.setdefault(tuple((key, value.shape) for key, value in state.items()), name) == name
    assert checkpoint.identify(state) == (name, 23)
