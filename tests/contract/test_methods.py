"""One contract over the whole registry: what every method keeps, whoever wrote it; and every pair that fits."""

import copy
import functools
import math
import warnings

import numpy as np
import pytest
import reference
import torch
from helpers import METHODS, refused, same
from methods import batch, build, model, sides
from torch import nn
from torch.nn import functional as F

import mdistiller.losses as L
from mdistiller import config
from mdistiller.device import prepare
from mdistiller.distillers import Distiller, LogitDistiller, distiller_dict
from mdistiller.engine.method import prepare_parts

DISTILS = [name for name in METHODS if name != "NONE"]
# Identical networks cost nothing, where the maths says so: the others have modules of their own between the two, or
# compare different things on the two sides (TTM, WTTM: another temperature; RLD: the teacher's mistakes).
ZERO = ("AT", "CTKD", "DIST", "DKD", "DTKD", "KD", "KDSVD", "MLKD", "NORMKD", "NST", "PKT", "RKD", "SP")
FEATURES = [name for name in METHODS if distiller_dict[name].needs_features]
STANDARDISED = ["EXPERIMENT.LOGIT_STAND", "True"]
LOGIT = {name: (name, []) for name in DISTILS if name not in FEATURES} | {
    "LSKD": ("KD", STANDARDISED),
    "CTKD instance": ("CTKD", ["TEMPERATURE.LEARNED.MODE", "instance"]),
    "CTKD standardised": ("CTKD", STANDARDISED),
    "MLKD standardised": ("MLKD", STANDARDISED),
}


def test_the_registry_is_the_published_list_and_declares_itself():
    names = "NONE KD DTKD FITNET AT NST PKT KDSVD OFD RKD VID SP CRD REVIEWKD DKD CTKD MLKD DIST NORMKD TTM WTTM RLD"
    assert set(METHODS) == {*names.split(), "CWD", "PKD"}
    for name in METHODS:
        cls = distiller_dict[name]
        assert issubclass(cls, Distiller) and cls.needs_teacher is (name != "NONE")
        assert cls.takes_teacher_logits is issubclass(cls, LogitDistiller) is (name in LOGIT)
    assert {name for name in METHODS if distiller_dict[name].needs} == {"CRD"}
    assert {name for name in METHODS if distiller_dict[name].has_parts} == {"KD", "DTKD", "DKD"}


@functools.cache
def filled(name):
    return reference.fill(model(name, 100))


@reference.needs_reference
@pytest.mark.parametrize("key", [key for key in reference.golden() if key.startswith("distiller/")])
def test_golden_figures(key):
    """Total loss, L2 norm of the student's gradients and extra parameters, by the reference's recipe."""
    _, teacher, student, method, epoch = key.split("/")
    student, teacher = (copy.deepcopy(filled(name)) for name in (student, teacher))
    extra, kwargs = (), {}
    if method == "CRD":
        negatives = torch.from_numpy(np.random.RandomState(2).randint(0, 50000, (8, 64)))
        extra, kwargs = (50000,), {"contrastive_index": torch.cat([torch.arange(8)[:, None], negatives], 1)}
    distiller = reference.fill(distiller_dict[method](student, teacher, config.load(), *extra)).train()
    image, target = reference.images(), reference.labels()
    _, losses = distiller(image=image, target=target, epoch=int(epoch), index=torch.arange(8), **kwargs)
    total = sum(loss.mean() for loss in losses.values())
    total.backward()
    norm = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).norm()
    figures = [total.item(), norm.item(), distiller.get_extra_parameters()]
    np.testing.assert_allclose(figures, reference.golden()[key], rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_reaches_every_learnable_parameter_and_nothing_of_the_teacher(method):
    models = model("MobileNetV2").train(), model("resnet8").train()
    before = [copy.deepcopy(m.state_dict()) for m in models]
    build(method, *models)
    assert same([m.state_dict() for m in models], before), "building leaves both as they were"
    distiller = build(method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits, losses = distiller(**batch())
    assert logits.shape == (4, 10)
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    assert set(losses) == {*distiller.task_losses} | ({"loss_kd"} if distiller.needs_teacher else set())
    sum(losses.values()).backward()
    learnable = distiller.get_learnable_parameters()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learnable)
    own = [p for name, p in distiller.named_parameters() if not name.startswith(("student.", "teacher."))]
    assert {id(p) for p in learnable} == {id(p) for p in [*distiller.student.parameters(), *own]}
    if distiller.teacher is not None:
        assert all(p.grad is None for p in distiller.teacher.parameters())
        assert distiller.teacher.training == (method == "OFD")
        assert not distiller.eval().teacher.training
    distiller.eval()
    assert torch.equal(distiller(image=batch()["image"]), distiller.student(batch()["image"])[0])


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast_leaves_the_losses_in_float32(method):
    distiller = prepare_parts(build(method), torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, losses = distiller(**batch())
    assert {value.dtype for value in (logits, *losses.values())} == {torch.float32}
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in distiller.get_learnable_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_no_loss_reads_a_value_from_the_device(method):
    """A meta tensor has no values: whatever would wait for the device to learn one raises here."""
    distiller = build(method, None, model("resnet8")).to("meta")
    _, losses = distiller(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in batch().items()})
    sum(losses.values()).backward()


@pytest.mark.parametrize("method", METHODS)
def test_the_batchs_order_does_not_matter(method):
    order, data, totals = torch.tensor([2, 0, 3, 1]), batch(), []
    given = {}  # what the contract leaves to chance, fixed: CRD's negatives, MLKD's strong view
    if method == "CRD":
        given["contrastive_index"] = torch.stack([torch.arange(4), torch.arange(4) + 10, torch.arange(4) + 15], 1)
    for permutation in (torch.arange(4), order):
        precision = torch.float32 if method == "CRD" else torch.float64  # CRD embeds in float32 whatever arrives
        distiller, image = build(method).to(precision), data["image"].to(precision)
        moved = {key: value[permutation] for key, value in given.items()}
        moved |= {key: data[key][permutation] for key in ("target", "index")}
        if method == "MLKD":
            moved["image_strong"] = image.flip(3)[permutation]
        _, losses = distiller(image=image[permutation], epoch=3, **moved)
        totals.append(sum(losses.values()))
    torch.testing.assert_close(*totals, rtol=1e-4, atol=1e-6)


def test_identical_networks_cost_nothing():
    for method in ZERO:
        teacher = model("resnet8")
        distiller = build(method, copy.deepcopy(teacher), teacher)
        distiller.student.eval()
        assert distiller(**batch())[1]["loss_kd"].abs() < 1e-4, method


class Net(nn.Module):
    """The smallest model that keeps the contract: (logits, feats)."""

    def __init__(self, classes, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(3 * 8 * 8, classes)
        nn.init.normal_(self.fc.weight, std=0.2)

    def forward(self, image):
        return self.fc(image.flatten(1)), {}


def logit_method(name, classes=5):
    method, opts = LOGIT[name]
    return build(method, Net(classes, 1), Net(classes, 2), *opts)


IMAGE = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 3, 1, 4, 2, 0])


@pytest.mark.parametrize("name", LOGIT)
def test_every_finite_input_gives_finite_losses_and_gradients(name):
    every = (-1e4, None, 1e4) if name == "CTKD" else (None,)
    for ends, (corner, v, u) in ((ends, side) for ends in every for side in sides()):
        method = logit_method(name, v.shape[1])
        if ends is not None:  # of the range of the learned temperature
            nn.init.constant_(method.rule.theta, ends)
        losses = method.losses(v, u, TARGET[: len(v)] % v.shape[1], epoch=20)
        assert set(losses) == {"loss_ce", "loss_kd"}
        for value in losses.values():
            assert value.dtype == torch.float32 and value.isfinite() and value >= -1e-4, corner
        sum(losses.values()).backward()
        own = [p for p in method.get_learnable_parameters() if p.grad is not None]
        for leaf in (v, *own) if u.grad is None else (v, u, *own):
            assert leaf.grad.isfinite().all(), corner


@pytest.mark.parametrize("name", LOGIT)
def test_a_logit_method_under_its_options(name):
    """Gradients reach all that learns, and stored logits stand for the teacher."""
    method = logit_method(name)
    extra = {"image_strong": IMAGE.flip(3)} if name.startswith("MLKD") else {}
    with torch.no_grad():
        stored, _ = method.teacher(IMAGE)
    passes = []
    method.teacher.register_forward_hook(lambda *_: passes.append(1))
    own, given = (
        method(image=IMAGE, target=TARGET, index=torch.arange(6), epoch=5, **extra, **more)[1]
        for more in ({}, {"logits_teacher": stored})
    )
    assert len(passes) == (3 if extra else 1)  # a strong view passes through the teacher all the same
    for key, value in own.items():
        torch.testing.assert_close(value, given[key])
    sum(own.values()).backward()
    for parameter in method.get_learnable_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0
    if name.startswith("CTKD"):
        counts = {"CTKD": 1, "CTKD instance": 10 * 5 + 5 + 5 + 1, "CTKD standardised": 0}
        assert method.get_extra_parameters() == counts[name]


def test_mlkd_counts_every_level_of_both_views(monkeypatch):
    strong = IMAGE.flip(3)
    monkeypatch.setattr("mdistiller.distillers.MLKD.strong_view", lambda image: strong)
    for name in ("MLKD", "MLKD standardised"):
        method = logit_method(name)
        _, losses = method(image=IMAGE, target=TARGET, index=torch.arange(6), epoch=1)
        expected_ce = expected_kd = 0.0
        for view in (IMAGE, strong):
            v, u = method.student(view)[0], method.teacher(view)[0]
            expected_ce = expected_ce + 0.1 * F.cross_entropy(v, TARGET)
            if name != "MLKD":
                v, u = ((x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True) for x in (v, u))
            for t in (2.0, 3.0, 4.0, 5.0, 6.0):
                expected_kd = expected_kd + 0.9 * (L.kd_loss(v, u, t) + sum(L.correlation_losses(v, u, t, t)))
        torch.testing.assert_close(losses["loss_ce"], expected_ce)
        torch.testing.assert_close(losses["loss_kd"], expected_kd)


@pytest.mark.parametrize("name", ["MLKD", "MLKD standardised"])
def test_mlkd_on_a_loaders_two_views_is_the_public_codes_loss(name):
    """In numpy, as that code masks, reduces and repeats. LSKD standardises its instance level alone."""

    def softmax(x, t):
        e = np.exp((x - x.max(1, keepdims=True)) / t)
        return e / e.sum(1, keepdims=True)

    def kd(v, u, t):
        if name != "MLKD":
            v, u = ((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (v, u))
        p, q = softmax(u, t), softmax(v, t)
        return t**2 * (p * np.log(p / q)).sum(1).mean()

    strong, method = IMAGE.flip(3), logit_method(name)
    method.double()
    images = IMAGE.double(), strong.double()
    _, losses = method(image=images[0], image_strong=images[1], target=TARGET, index=torch.arange(6), epoch=1)
    (v, vs), (u, us) = ([net(x)[0].detach().numpy() for x in images] for net in (method.student, method.teacher))
    p = softmax(u, 1)
    samples = (p.max(1) <= np.percentile(p.max(1), 50)).mean()
    classes = (p.sum(0) <= np.percentile(p.sum(0), 50)).mean()
    assert (samples, classes) == (3 / 6, 3 / 5)
    total = sum(kd(vs, us, t) for t in (4, 3, 5)) + sum(kd(v, u, t) for t in (2, 6))
    for t in (4, 3, 5, 2, 6):
        q, p = softmax(v, t), softmax(u, t)
        total += samples * (kd(v, u, t) + ((p @ p.T - q @ q.T) ** 2).sum() / 6)
        total += classes * ((p.T @ p - q.T @ q) ** 2).sum() / 5
    ce = -sum(np.log(softmax(x, 1)[range(6), TARGET]).mean() for x in (v, vs))
    assert losses["loss_kd"].item() == pytest.approx(0.9 * total, rel=1e-6)
    assert losses["loss_ce"].item() == pytest.approx(0.1 * ce, rel=1e-6)


def test_rld_rises_to_its_weight_with_a_temperature_of_each_part():
    """One sample worked out by hand: the teacher errs, u = (ln 4, ln 2, 0), the label is 1, the student is even.

    At ALPHA_T 1: p = (4, 2, 1) / 7, so that (4/7, 3/7) is compared with the student's (1/3, 2/3). Only class 2 lies
    below the label: the masked correlation is 0, whatever T.
    """
    method = logit_method("RLD", 3)
    v, u = torch.zeros(1, 3), torch.tensor([[4.0, 2.0, 1.0]]).log()
    confidence = 4 / 7 * math.log(12 / 7) + 3 / 7 * math.log(9 / 14)
    for epoch, share in ((1, 0.05), (7, 0.35), (20, 1.0), (200, 1.0)):
        losses = method.losses(v, u, torch.tensor([1]), epoch=epoch)
        assert losses["loss_kd"].item() == pytest.approx(share * confidence, rel=1e-5)
        assert losses["loss_ce"].item() == pytest.approx(math.log(3), rel=1e-5)


# three stages against four; four against three; the student's maps are the larger ones
PAIRS = "resnet8/MobileNetV2 ResNet18/resnet8 vgg8/resnet8 wrn_16_2/ShuffleV1".split()
MORE_PAIRS = "resnet8x4/resnet8 vgg8/MobileNetV2 resnet8x4/ShuffleV2 ShuffleV1/vgg8 ShuffleV2/resnet8".split()


@functools.cache
def shared(name, side):
    return model(name)


@pytest.mark.parametrize("method", ["DKD", *FEATURES])
def test_pairs(method):
    for pair in PAIRS + (MORE_PAIRS if method == "VID" else []):  # VID has a module for each stage
        teacher, student = pair.split("/")
        distiller = build(method, shared(student, "student"), shared(teacher, "teacher"))
        logits, losses = distiller(**batch())
        assert logits.shape == (4, 10)
        assert all(loss.isfinite() for loss in losses.values())
        grads = torch.autograd.grad(losses["loss_kd"], distiller.get_learnable_parameters(), allow_unused=True)
        assert all(grad is None or grad.isfinite().all() for grad in grads)
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_pairs_and_settings_that_do_not_fit_are_refused():
    strided, unnamed = model("MobileNetV2"), prepare(Net(10, 0), torch.device("cpu"))
    strided.conv1[0].stride = (4, 4)
    unnamed.get_stage_channels = model("resnet8").get_stage_channels
    for method, student, teacher, opts, says in (
        ("OFD", model("resnet8"), model("ShuffleV2"), (), r"^OFD: \w+ -> \w+: .* covers 58 of 116 channels$"),
        ("OFD", model("resnet8"), unnamed, (), r"no get_bn_before_relu\(\)$"),
        ("FITNET", strided, model("resnet8"), (), "^FITNET: ResNet -> MobileNet: no regressor from a 4 x 4 map to 16"),
        ("FITNET", None, None, ("FITNET.HINT_LAYER", "4"), "HINT_LAYER 4 must be 0 to 3"),
        ("REVIEWKD", None, None, ("REVIEWKD.IN_CHANNELS", "[8, 8, 8, 8]"), r"must be \[16, 32, 64, 64\]"),
        ("REVIEWKD", None, None, ("REVIEWKD.OUT_SHAPES", "[1, 8, 16, 'wide']"), "OUT_SHAPES: must be a list, such as"),
        ("CRD", None, None, ("CRD.MODE", "loose"), "known: exact, relax"),
        ("KDSVD", None, None, ("KDSVD.K", "0"), "must be at least 1"),
        ("OFD", None, None, ("OFD.CONNECTOR.KERNEL_SIZE", "2"), "must be odd"),
        ("VID", None, None, ("VID.INIT_PRED_VAR", "0.0"), "greater than 0"),
        ("VID", None, None, ("VID.INIT_PRED_VAR", "1e-6"), "must exceed VID.EPS"),
    ):
        with refused(says):
            build(method, student, teacher, *opts)


def test_reviewkd_takes_the_widths_that_it_would_read():
    widths = "[16, 32, 64, 64]"
    build("REVIEWKD", None, None, "REVIEWKD.IN_CHANNELS", widths, "REVIEWKD.OUT_CHANNELS", widths)


def test_vid_log_scales_are_counted_apart():
    distiller = build("VID")
    assert len(distiller.log_scales) == 3
    for log_scale in distiller.log_scales:
        torch.testing.assert_close(F.softplus(log_scale) + 1e-5, torch.full_like(log_scale, 5.0))
    assert distiller.get_extra_parameters() == 3 * (16**2 + 32**2 + 64**2)
