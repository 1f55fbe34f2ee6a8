"""What people get wrong in methods, rules, models and data of their own: a line that says what to write instead."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from helpers import changed, digits_opts
from notebook import IMAGES, LABELS, TEST, TRAIN, Net, nets, quick
from torch import nn
from torch.nn import functional as F

import mdistiller as md
from mdistiller import registry
from mdistiller.config import load
from mdistiller.dataset import image_set, load_dataset
from mdistiller.distillers import Distiller, FeatureDistiller, LogitDistiller
from mdistiller.engine.build import check_last_batch
from mdistiller.engine.run import open_workspace, train
from mdistiller.losses import Temperatures, ce_loss


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a test enters is forgotten at its end."""
    for held in registry.REGISTRIES.values():
        monkeypatch.setattr(held, "data", dict(held.data))
        monkeypatch.setattr(held, "own", dict(held.own))


def refusal(*given, **changes):
    """The line that `md.distill` ends with; of two networks of one's own, unless told otherwise."""
    with pytest.raises(md.UserError) as caught:
        quick(**dict(zip(("teacher", "student"), given or nets(), strict=True)) | {"epochs": 1} | changes)
    (line,) = caught.value.lines
    return line


def logit_method(losses):
    md.register_method("MINE")(type("Mine", (LogitDistiller,), {"losses": losses}))


def ce(student, target):
    return {"loss_ce": ce_loss(student, target)}


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        (LogitDistiller.losses, "losses is not written; write losses(self, logits_student, logits_teacher, target, **"),
        (lambda self, v, u, target: ce(v, target), "argument 'index'; it is called as losses(self, logits_student, l"),
        (lambda self, v, u, target, **kwargs: ce_loss(v, target), 'losses by name: {"loss_ce": ...'),
        (lambda self, v, u, target, **kwargs: {}, "got no loss"),
        (lambda self, v, u, target, **kwargs: {"loss_ce": 1.0}, "got 'loss_ce': float"),
        (lambda self, v, u, target, **kwargs: ce(v.detach(), target), "no loss has a gradient"),
        (lambda self, v, u, target, **kwargs: ce(v, kwargs["no"]), "test_mistakes.py:"),
    ],
    ids=["unwritten", "no kwargs", "a tensor", "none", "a number", "detached", "a bug"],
)
def test_the_losses_of_a_method(losses, says):
    logit_method(losses)
    line = refusal(method="MINE")
    assert says in line and "MINE" in line


def test_other_parts_of_a_method():
    class Bare(Distiller):
        pass

    class NoLogits(Distiller):
        def forward_train(self, image, target, **kwargs):
            return ce(self.student(image)[0], target)

    class TwoArguments(LogitDistiller):
        def __init__(self, student, teacher):
            super().__init__(student, teacher)

        losses = staticmethod(lambda *given, **kwargs: {})

    class Hint(FeatureDistiller):
        def feature_loss(self, feats_student, feats_teacher, **kwargs):
            return {"loss_kd": 1}

    for cls, says in (
        (Bare, "forward_train is not written"),
        (NoLogits, "forward_train must return the student's logits (B, K) and the losses"),
        (TwoArguments, "it is called as (student, teacher, cfg)"),
        (Hint, "feature_loss must return the loss, a scalar tensor; got dict"),
    ):
        name = cls.__name__.upper()
        md.register_method(name)(cls)
        layers = (["conv"], ["conv"]) if cls is Hint else None
        assert says in refusal(method=name, layers=layers)


def test_a_method_needs_no_constructor():
    @md.register_method("PLAIN_OWN", defaults={"WEIGHT": 2.0})
    class Plain(LogitDistiller):
        def losses(self, logits_student, logits_teacher, target, **kwargs):
            return {"loss_kd": self.cfg.PLAIN_OWN.WEIGHT * F.mse_loss(logits_student, logits_teacher)}

    @md.register_method("PLAIN_HINT")
    class Hint(FeatureDistiller):
        def feature_loss(self, feats_student, feats_teacher, **kwargs):
            return feats_student["feats"][0].square().mean()

    assert quick(*nets(), method="PLAIN_OWN", epochs=1).history[0]["train_losses"]["loss/loss_kd"] > 0
    row = quick(*nets(), method="PLAIN_HINT", epochs=1, layers=(["conv"], ["conv"])).history[0]
    assert row["train_losses"].keys() == {"loss/loss_ce", "loss/loss_kd"}


def columns(v, *values):
    return [torch.full_like(v[:, :1], value) for value in values]


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda v: Temperatures(*columns(v, -1, 1, 1), v[:, :1] < 9e9), "the student's temperatures"),
        (lambda v: Temperatures(*columns(v, 1, 0, 1), v[:, :1] < 9e9), "the teacher's temperatures"),
        (lambda v: Temperatures(*[v.amax(1).exp()] * 4), "student must be a tensor (B, 1); got (16,) for B = 16"),
        (lambda v: Temperatures(4.0, 4.0, 16.0, True), "student must be a tensor (B, 1); got float"),
        (lambda v: tuple(columns(v, 1, 1, 1, 1)), "must return mdistiller.losses.Temperatures(student, teacher, fa"),
        (lambda v: v.no_such_thing, "fails at "),
    ],
    ids=["negative", "zero", "a row", "numbers", "a tuple", "a bug"],
)
def test_what_a_rule_returns(made, says):
    md.register_rule("mine")(lambda logits_student, logits_teacher, tau: made(logits_student))
    line = refusal(method="KD", TEMPERATURE__RULE="mine")
    assert says in line and line.startswith("the temperature rule mine")


def test_how_a_rule_is_called():
    md.register_rule("two")(lambda logits_student, logits_teacher: None)
    assert "it is called as rule(logits_student, logits_teacher, tau" in refusal(method="KD", TEMPERATURE__RULE="two")

    @md.register_rule("odd")
    class Odd:
        def __init__(self, teacher):
            pass

    assert "must derive from torch.nn.Module" in refusal(method="KD", TEMPERATURE__RULE="odd")


def test_models():
    class Wrong(nn.Module):
        def __init__(self, width=4):
            super().__init__()

    class Failing(nn.Module):
        def __init__(self, num_classes):
            self.fc = nn.Linear(2, num_classes)

    class Squeezed(Net):
        def forward(self, x):
            return super().forward(x).squeeze()

    for cls, says in (
        (Wrong, "unexpected keyword argument 'num_classes'; it is called as Wrong(num_classes=...)"),
        (Failing, "the model Failing fails at "),
    ):
        md.register_model(cls)
        assert says in refusal(nets()[0], cls.__name__)
    assert "must give logits (1, 4) for one image; it gives shape (4,)" in refusal(nets()[0], Squeezed(8))
    with pytest.raises(md.UserError, match=r"logits \(B, K\), K 4 or more for these labels; it gives \(40, 2\)"):
        md.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), TEST, device="cpu")
    line = refusal(method="AT")
    assert "the model Net does not give feats" in line and "layers=([the teacher's], [the student's])" in line
    assert "layers=" not in refusal(method="OFD", layers=(["conv"], ["conv"]))  # which give no preact_feats


def test_networks_under_methods_that_need_more_of_them(tmp_path, monkeypatch):
    """Each of them is a line, before anything is written."""
    monkeypatch.chdir(tmp_path)

    class Staged(Net):
        def forward(self, x):
            x = self.bn(self.conv(x)).relu()
            return self.fc(x.mean((2, 3))), {"feats": [x], "preact_feats": [x], "pooled_feat": x.mean((2, 3), True)}

        def get_stage_channels(self):
            return [8]

    for method, says in (
        *((name, "'feats' must be a list of 2 or more maps (B, C, H, W)") for name in ("AT", "KDSVD", "NST", "VID")),
        *((name, "'pooled_feat' must be features (B, C)") for name in ("CRD", "PKT", "RKD", "REVIEWKD")),
        ("OFD", "'preact_feats' must be a list of 2 or more maps"),
    ):
        assert says in refusal(Staged(8), Staged(8), method=method, folder=tmp_path / "mine"), method
    assert "'feats' must be a list of 2 or more maps" in refusal(*nets(), method="AT", layers=(["conv"], ["conv"]))
    assert not list(tmp_path.iterdir())


def test_a_sequence_of_convolutions_has_classes_too():
    """CTKD asks for them by the last nn.Linear, where there is one."""
    teacher, student = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()) for _ in range(2))
    quick(teacher, student, method="CTKD", epochs=1, TEMPERATURE__LEARNED__MODE="instance")


def test_auxiliary_classifiers_in_training_are_left_alone():
    class Outputs(NamedTuple):
        logits: torch.Tensor
        aux: torch.Tensor
        more: torch.Tensor

    class Auxiliary(Net):
        def forward(self, x):
            logits = super().forward(x)
            return Outputs(logits, logits, logits) if self.training else logits

    plain, auxiliary = nets()[1], Auxiliary(8)
    auxiliary.load_state_dict(plain.state_dict())
    runs = [quick(nets()[0], student, method="KD", epochs=1).history[0] for student in (plain, auxiliary)]
    assert runs[0]["train_loss"] == runs[1]["train_loss"]


NO_MODEL = "the model 'net': must be a class or a function of num_classes"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("register_model(Net(4))", "got an object, Net(...): pass the class itself"),
        ("register_model('net')(Net(4))", f"{NO_MODEL}; got an obj"),
        ("cifar_model_dict['net'] = Net(4)", f"{NO_MODEL}; got an obj"),
        ("cifar_model_dict['net'] = (Net(4), '')", NO_MODEL),
        ("cifar_model_dict['net'] = None", f"{NO_MODEL}; got None"),
    ],
)
def test_what_is_registered_as_a_model(tmp_path, line, says):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\nfrom mdistiller.models import cifar_model_dict, register_model\n"
        f"class Net(nn.Linear):\n    def __init__(self, num_classes): super().__init__(3, num_classes)\n{line}\n"
    )
    assert says in refused(lambda: load(None, ["EXPERIMENT.PLUGINS", str(file), "DISTILLER.STUDENT", "net"]))


def test_data():
    assert "unknown augmentation 'flip'; " in refused(lambda: image_set(TRAIN, TEST, augment="flip"))
    assert "120 whole numbers from 0; got float64" in refused(lambda: image_set((IMAGES, LABELS / 2), TEST))
    halves = [(image, label / 2) for image, label in zip(IMAGES, LABELS, strict=True)]
    assert "whole numbers from 0; got float64" in refused(lambda: image_set(halves, TEST))
    assert "train: labels must be 0 to 3, for 4 classes; got -1" in refused(
        lambda: image_set((IMAGES, LABELS - 1), TEST)
    )
    counted = image_set((IMAGES, LABELS), TEST, num_classes=4)
    assert not counted.doubts()
    assert "must be 0 to 3, for 4 classes; got 4; labels count from 0" in refused(
        lambda: image_set((IMAGES, LABELS + 1), TEST, num_classes=4)
    )
    md.register_dataset("broken")(lambda root: (root / "gone.npy").read_bytes())
    assert "gone.npy" in refused(lambda: load_dataset("broken", "."))
    md.register_dataset("failing")(lambda root: root.no_such_thing)
    assert "the data set failing fails at " in refused(lambda: load_dataset("failing", "."))


def refused(call):
    with pytest.raises(md.UserError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("shift", "test_shift", "says"),
    [
        (1, 1, "1 of 5 classes have no training image: 0; labels count from 0: subtract 1 where yours count from 1"),
        (0, 2, "2 of 6 classes have no training image: 4, 5; 20 test images are of them"),
    ],
)
def test_classes_that_nothing_is_learned_of_are_said_before_training(capsys, shift, test_shift, says):
    images, labels = TEST
    network = type("Wide", (Net,), {})(8)
    network.fc = nn.Linear(8, 4 + max(shift, test_shift))
    quick(None, network, method=None, train=(TRAIN[0], TRAIN[1] + shift), test=(images, labels + test_shift), epochs=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"warning: {says}" and lines[2].startswith("epoch 1/1")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "DTK"}, "did you mean DTKD"),
        ({"resume": True}, "pass folder="),
        ({"test": None}, "test: must be a pair (images, labels), or a Dataset"),
        ({"teacher": None, "method": "KD"}, "KD needs a teacher; pass teacher="),
        ({"student": Net(8).requires_grad_(False)}, "no parameter that learns"),
        ({"augment": "flip"}, "DATASET.AUGMENT"),
        ({"method": "AT", "layers": (["conv"], ["cov"])}, "did you mean conv"),
        ({"method": "AT", "layers": (["conv"], ["fc"])}, "a feature map is"),
        ({"train": "digits"}, "leave test out"),
        ({"train": (IMAGES.astype(float) - 300, LABELS)}, "leave out your own normalisation"),
        ({"train": (IMAGES[:, :8], LABELS)}, "square"),
        ({"train": (IMAGES, LABELS[:5])}, "120 whole numbers"),
        ({"SOLVER__LRR": 1}, "did you mean SOLVER.LR"),
        ({"student": Net}, "student: is the class Net; pass an object of it, Net(...)"),
        ({"teacher": nets}, "teacher: must be a name"),
        ({"teacher": "resnet8", "method": "AT", "layers": (["conv"], ["conv"])}, "the teacher is 'resnet8'"),
        ({"seeds": -1}, "seeds: must be different whole numbers from 0"),
        ({"seeds": [1, 1]}, "seeds: must be different whole numbers from 0"),
        ({"seeds": []}, "seeds: must be different whole numbers from 0"),
        ({"seeds": "0-2"}, "got '0-2'"),
        ({"layers": ("conv", "conv")}, 'layers: must be two lists of names, the teacher\'s first, such as (["stem"]'),
        ({"layers": ["conv"]}, "layers: must be two lists"),
        ({"epochs": "3"}, "epochs: must be a whole number, such as 30; got '3'"),
        ({"epochs": 2.5}, "epochs: must be a whole number, such as 30; got 2.5"),
        ({"epochs": -1}, "SOLVER.EPOCHS: must be at least 1, and at most 1048575; got -1"),
        ({"DISTILLER__STUDENT": "resnet8"}, "DISTILLER.STUDENT: pass student= in its place"),
        ({"SOLVER__EPOCHS": 2}, "SOLVER.EPOCHS: pass epochs= in its place"),
        ({"LOG__PREFIX": "x"}, "LOG.PREFIX: pass folder= in its place"),
        ({"EXPERIMENT__NAME": "x"}, "EXPERIMENT.NAME: pass folder= in its place"),
        ({"DATASET__TYPE": "digits"}, "DATASET.TYPE: pass train= in its place"),
        ({"train": "python", "test": None}, "distill: networks on python are built by name; pass one of gpt"),
        ({"train": "scenes", "test": None}, "distill: networks on scenes are built by name; pass one of "),
        ({"SOLVER__LR": -1}, "got -1.0 (keyword of distill) [Learning rate of the first epoch]"),
    ],
)
def test_arguments(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(**given)
    assert not list(tmp_path.iterdir())


def test_overrides():
    with pytest.raises(md.UserError) as caught:
        md.train(None, "SOLVER.EPOCHS 1")
    assert 'overrides: must be {"SOLVER.EPOCHS": 6}, or ["SOLVER.EPOCHS", 6]' in str(caught.value)
    with pytest.raises(md.UserError, match=r"did you mean SOLVER.LR\? \(overrides\)$"):
        md.load_config(md.load_config(), {"SOLVER.LRR": 1})


def test_a_refusal_leaves_no_teacher_in_the_folder(tmp_path):
    refusal(method="AT", folder=tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_nobody_reads_the_name_of_a_folder_that_goes(capsys):
    quick(*nets(), epochs=1, seeds=[0, 1])
    with contextlib.suppress(md.UserError):
        quick(*nets(), epochs=1, SOLVER__LR=1e15)
    said = capsys.readouterr().out
    assert "result: " in said and "/" not in said.replace("epoch 1/1", "").replace("img/s", "")


def test_a_diverged_run_without_a_folder_says_how_to_keep_its_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(md.UserError) as caught:
        quick(*nets(), SOLVER__LR=1e15)
    assert "folder= keeps the batch" in str(caught.value) and "/tmp" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"DISTILLER.TYPE": "OFD", "DISTILLER.TEACHER": "Plain", "DISTILLER.STUDENT": "Plain"}, "not give preact_"),
        ({"DISTILLER.TYPE": "FITNET", "FITNET.HINT_LAYER": 9}, "FITNET.HINT_LAYER 9 must be 0 to 3"),
        ({"DISTILLER.TYPE": "MINE"}, "got no loss"),
    ],
)
def test_a_method_is_refused_before_its_teacher_is_trained(tmp_path, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    md.register_model(type("Plain", (nn.Sequential,), {"__init__": lambda self, num_classes: plain(self, num_classes)}))
    logit_method(lambda *given, **kwargs: {})
    opts = digits_opts(DISTILLER__TEACHER="resnet8", DISTILLER__TRAIN_TEACHER=True)
    with pytest.raises(md.UserError, match=says):
        md.train(None, dict(zip(opts[::2], opts[1::2], strict=True)) | changes)
    assert not list(tmp_path.iterdir())


def plain(self, num_classes):
    nn.Sequential.__init__(self, nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))


def test_settings_without_effect_are_named(capsys):
    given = {"CRD__NCE__K": 5, "TEMPERATURE__ERRATUM__MARGIN": 0.1, "SOLVER__DOT__DELTA": 0.1, "KD__TEMPERATURE": 2.0}
    quick(*nets(), method="KD", epochs=1, **given)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert line == (
        "no effect here: CRD.NCE.K (KD does not read it), TEMPERATURE.ERRATUM.MARGIN (the temperature "
        "rule is fixed), SOLVER.DOT.DELTA (SOLVER.TRAINER is base)"
    )
    quick(*nets(), method="CTKD", epochs=1, TEMPERATURE__LEARNED__MODE="instance", KD__TEMPERATURE=2.0)
    assert "no effect" not in capsys.readouterr().out, "CTKD reads KD's temperature"
    quick(None, nets()[1], method=None, epochs=1, TEACHER_BANK="off", TEMPERATURE__DETACH=True)
    assert "TEACHER_BANK (NONE has no teacher), TEMPERATURE.DETACH (NONE has no teacher)" in capsys.readouterr().out


def test_a_last_batch_of_one_image_is_known_before_anything_is_written(small, tmp_path):
    opts = changed(small, tmp_path, DISTILLER__STUDENT="MobileNetV2", SOLVER__BATCH_SIZE=13)
    for method, more, says in (
        ("REVIEWKD", [], "13 leaves one of 40 images to the last batch.*set SOLVER.DROP_LAST True"),
        ("REVIEWKD", ["SOLVER.BATCH_SIZE", 1], "take a larger one"),
        ("REVIEWKD", ["SOLVER.BATCH_SIZE", 8, "SOLVER.ACCUMULATE", 8], "a part of a batch.*lower SOLVER.ACCUMULATE 8"),
        ("NONE", ["SOLVER.DROP_LAST", True, "SOLVER.BATCH_SIZE", 2000], "40 training images fill no batch"),
    ):
        with pytest.raises(md.UserError, match=says):
            train(load(None, [*opts, "DISTILLER.TYPE", method, *more]))
    assert not list(tmp_path.iterdir())
    cfg = load(None, [*opts, "DISTILLER.TYPE", "REVIEWKD", "SOLVER.DROP_LAST", True])
    check_last_batch(cfg, open_workspace(cfg))
