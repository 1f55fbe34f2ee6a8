"""The library as a user calls it: own networks, own data, names, seeds, folders."""

import signal

import numpy as np
import pytest
import torch
from helpers import changed, unnamed
from notebook import IMAGES, LABELS, TEST, TRAIN, Net, nets, quick
from torch import nn
from torch.utils.data import TensorDataset

import mdistiller as md
from mdistiller.distillers import Vanilla, distiller_dict


def test_any_network_and_any_arrays():
    teacher, student = nets()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    result = quick(teacher, student)
    assert [row["epoch"] for row in result.history] == [1, 2]
    assert result.last == result.history[-1]["test_acc"]
    assert result.best == max(row["test_acc"] for row in result.history)
    assert result.folder is None
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert not all(torch.equal(value, before[key]) for key, value in result.student.state_dict().items())
    assert result.student(torch.zeros(2, 3, 16, 16)).shape == (2, 4)  # logits alone, as its author wrote it
    best = f"best={result.best:.2f} in epoch {result.best_epoch} of 2"
    assert repr(result) == f"Result(seed=0, last={result.last:.2f}, {best}, folder=None)"


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_result_says_how_its_student_is_fed(amp):
    darker = IMAGES[80:] // 2, LABELS[80:]  # other statistics than the training images'
    result = quick(*nets(), test=darker, SOLVER__AMP=amp)
    data = md.image_set(TRAIN, darker)
    assert (result.mean, result.std) == (data.mean, data.std)
    row = result.history[-1]
    expected = row["test_acc"], row.get("test_acc_top5"), row["test_loss"]
    assert md.evaluate(result, darker, device="cpu") == expected
    assert md.evaluate(result, data, device="cpu") == expected
    if amp == "none":
        fed = {"mean": result.mean, "std": result.std}
        assert md.evaluate(result.student, darker, device="cpu", **fed) == expected
        assert md.evaluate(result.student, darker, device="cpu").loss != expected[2]  # by these images' own


def test_images_are_normalised_as_the_teacher_was_taught(capsys):
    given, (teacher, student) = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}, nets()
    result = quick(teacher, student, epochs=1, **given)
    assert (result.mean, result.std) == (given["mean"], given["std"])
    reached = md.evaluate(teacher, TEST, device="cpu", **given).top1
    assert f"the teacher on the test set: top-1 {reached:.2f}\n" in capsys.readouterr().out
    assert result.history != quick(teacher, student, epochs=1).history


def test_the_callers_state_is_left_and_quiet_is_silent(capsys):
    np.random.seed(5), torch.manual_seed(5)
    expected = np.random.rand(), torch.rand(1)
    np.random.seed(5), torch.manual_seed(5)
    networks = FixedNet(8), FixedNet(6)
    torch.manual_seed(5)
    result = quick(*networks, epochs=1, quiet=True, DETERMINISTIC=True)
    md.evaluate(result, TEST, device="cpu")
    assert (np.random.rand(), torch.rand(1)) == expected
    assert not torch.are_deterministic_algorithms_enabled()
    assert capsys.readouterr() == ("", "")
    quick(*networks, epochs=1)
    assert "test top-1" in capsys.readouterr().out


def test_the_method_is_the_one_that_is_named():
    @md.register_method("ALONE")
    class Alone(Vanilla):
        def forward_train(self, image, target, **kwargs):
            logits, losses = super().forward_train(image, target, **kwargs)
            return logits, {"alone": 2 * losses["ce"]}

    class Unnamed(Alone):
        pass

    try:
        named = None, "NONE", "ALONE", Alone, Unnamed, Unnamed
        runs = [quick(None, nets()[1], method=method, epochs=1) for method in named]
    finally:
        for name in ("ALONE", "Unnamed"):
            del distiller_dict.own[name], distiller_dict.data[name]
    assert [[*run.history[0]["train_losses"]] for run in runs] == [["loss/ce"]] * 2 + [["loss/alone"]] * 4
    assert {*quick(*nets(), method=None, epochs=1).history[0]["train_losses"]} == {"loss/loss_ce", "loss/loss_kd"}


def test_augmentation_of_what_the_caller_brings():
    losses = {}
    for augment in ("auto", "crop", "crop_flip", "none"):
        losses[augment] = quick(*nets(), epochs=1, augment=augment).history[0]["train_loss"]
    assert losses["auto"] == losses["crop"]
    assert len({*losses.values()}) == 3


@pytest.mark.parametrize("trainer", ["base", "dot"])
def test_a_student_may_be_frozen_in_part(trainer):
    teacher, student = nets()
    student.conv.requires_grad_(False)
    result = quick(teacher, student, epochs=1, SOLVER__TRAINER=trainer)
    assert torch.equal(result.student.conv.weight, student.conv.weight)
    assert not torch.equal(result.student.fc.weight, student.fc.weight)


def test_the_same_data_in_any_form_gives_the_same_student():
    tensors = [
        (torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)) for images, labels in (TRAIN, TEST)
    ]
    sets = [TensorDataset(images.float() / 255, labels) for images, labels in tensors]
    students = [quick(*nets(), *data, epochs=1).student for data in ((TRAIN, TEST), tensors, sets)]
    for other in students[1:]:
        for value, expected in zip(other.state_dict().values(), students[0].state_dict().values(), strict=True):
            assert torch.equal(value, expected)


def test_seeds_and_a_folder_to_go_on_in(tmp_path):
    first = quick(*nets(), seeds=[3, 4], epochs=1, folder=tmp_path / "mine")
    assert [run.seed for run in first] == [3, 4]
    assert first.last[0] == pytest.approx(np.mean([run.last for run in first]))
    again = quick(*nets(), seeds=[3, 4], epochs=2, folder=tmp_path / "mine", resume="auto")
    assert [len(run.history) for run in again] == [2, 2]
    assert again[0].history[0] == first[0].history[0]
    assert (again[1].folder / "student_best").exists()
    one = quick(*nets(), epochs=1, seeds=2, layers=None, folder=tmp_path / "one")
    assert [run.seed for run in one] == [2] and len(list((tmp_path / "one").glob("teacher-*"))) == 1
    for given in ({"resume": False}, {"epochs": 5, "resume": True}):  # the rate falls where it was to fall at first
        alone = quick(*nets(), **{"epochs": 4, "folder": tmp_path / "alone"} | given)
    rates = [row["lr"] for row in alone.history]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.0005, 0.0005])


@pytest.mark.parametrize("method", ["AT", "FITNET", "SP", "CRD", "RKD", "VID"])
def test_features_of_named_layers(method):
    layers = (["conv", "depthwise"], ["conv", "depthwise"])
    options = {"FITNET__HINT_LAYER": 1, "CRD__NCE__K": 8} if method in ("FITNET", "CRD") else {}
    result = quick(*nets(), method=method, epochs=1, layers=layers, **options)
    assert np.isfinite(result.history[0]["train_loss"])
    assert result.student(torch.zeros(1, 3, 16, 16)).shape == (1, 4)


class FixedNet(nn.Module):
    """Takes images of 16 x 16 alone, and gives all of the feature contract."""

    def __init__(self, width: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, width, 3, s, 1) for i, s in ((3, 1), (width, 1), (width, 2)))
        self.bn, self.pool, self.fc = nn.BatchNorm2d(width), nn.Linear(width * 64, 12), nn.Linear(12, 4)

    def get_stage_channels(self):
        return [conv.out_channels for conv in self.convs]

    def get_bn_before_relu(self):
        return [self.bn, self.bn]  # of the stages after the stem

    def forward(self, x):
        before, after = [], []
        for conv in self.convs:
            before.append(conv(x))
            x = before[-1].relu()
            after.append(x)
        pooled = self.pool(x.flatten(1)).relu()
        return self.fc(pooled), {"feats": after, "preact_feats": before, "pooled_feat": pooled}


@pytest.mark.parametrize("method", [name for name, cls in sorted(distiller_dict.items()) if cls.needs_features])
def test_features_of_networks_that_take_one_size_of_images(method):
    options = {"CRD__NCE__K": 8} if method == "CRD" else {}
    result = quick(FixedNet(8), FixedNet(6), method=method, epochs=1, SOLVER__LR=0.001, **options)
    assert np.isfinite(result.history[0]["train_loss"])


def test_the_student_alone_and_names(small):
    given = dict(zip(small[::2], small[1::2], strict=True))
    result = md.distill(student="resnet8", train="npz", epochs=1, DEVICE="cpu", DATASET__ROOT=given["DATASET.ROOT"])
    assert result.history[0]["train_losses"].keys() == {"loss/ce"}


def test_train_does_what_the_command_does(small, tmp_path):
    opts = changed(unnamed(small), tmp_path, DISTILLER__TYPE="NONE")
    by_list = md.train(None, opts)
    by_dict = md.train(None, dict(zip(opts[::2], opts[1::2], strict=True)) | {"EXPERIMENT.TAG": "again"})
    figures = [{k: row[k] for k in ("train_loss", "test_acc")} for row in (by_list.history[0], by_dict.history[0])]
    assert figures[0] == figures[1]
    assert by_list.folder.parent == tmp_path / "distill"
    assert "SOLVER.BATCH_SIZE:16" in by_list.folder.name


class Overflow(Net):
    """Sends SIGINT in its third pass over a training batch, or overflows there."""

    def __init__(self, how: str):
        super().__init__(8)
        self.how, self.passes = how, 0

    def forward(self, x):
        self.passes += self.training
        if self.passes == 3 and self.how == "signal":
            signal.raise_signal(signal.SIGINT)
        return super().forward(x) * (torch.inf if self.passes == 3 and self.how == "overflow" else 1)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("how", ["signal", "overflow"])
def test_what_stops_a_run_says_what_is_kept_of_it(tmp_path, kept, how):
    with pytest.raises(md.UserError) as caught:
        quick(nets()[0], Overflow(how), folder=tmp_path / "mine" if kept else None, SOLVER__STEP="eager")
    text = str(caught.value)
    assert "replay.py" not in text and ("--resume auto" in text) is (kept and how == "signal")
    assert ("folder= " in text) is not kept
    if kept and how == "overflow":
        (file,) = (tmp_path / "mine" / "run").glob("bad_batch*")
        assert str(file) in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("resnet9", TEST, "some file"), "did you mean resnet"),
        (("resnet8", "digit", "some file"), "did you mean digits"),
        (("resnet8", TEST), "pass weights="),
        ((Net(8), "scenes"), "scenes is for detection, .* with tools/eval.py"),
        ((Net(8), "python"), "python is for text, .* with tools/eval.py"),
        ((md.Results(()), TEST), "0 runs; pass one"),
        ((Net(8), TEST, None, "cpu", (0.5, 0.5)), "mean: must be three numbers"),
        ((Net(8), TEST, None, "cpu", None, (0.5, 0, 1)), "std: must be three numbers"),
    ],
)
def test_a_mistake_in_evaluate_is_a_line(given, says):
    with pytest.raises(md.UserError, match=says):
        md.evaluate(*given)


def test_every_public_name_is_there_and_documented():
    for name in md.__all__:
        assert getattr(md, name).__doc__, name
    assert set(md.__all__) <= set(dir(md))
