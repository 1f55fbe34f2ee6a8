"""The logit methods of 2022-2024 as functions of logits, and on a small pair: formulas, properties, edges."""

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mdistiller import config
from mdistiller.distillers import LogitDistiller, distiller_dict
from mdistiller.distillers.CTKD import LearnedTemperature, curriculum, learned_temperature
from mdistiller.distillers.DIST import dist_loss, pearson
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.losses import deviation, softened_kl
from mdistiller.distillers.MLKD import correlation_losses, mlkd_loss, strong_view
from mdistiller.distillers.NORMKD import normkd_loss
from mdistiller.distillers.RLD import mcd_loss, rld_loss, scd_loss
from mdistiller.distillers.rules import norm, std
from mdistiller.distillers.TTM import power_sum, ttm_loss, wttm_loss
from mdistiller.engine.build import build_distiller
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict

ROOT = Path(__file__).resolve().parents[1]
TARGET = torch.tensor([0, 3, 1, 4, 2, 0])
LOSSES = {
    "LSKD": lambda v, u: softened_kl(v, u, std(v, u, 2.0)),
    "NORMKD": lambda v, u: normkd_loss(v, u, 2.0),
    "DIST": lambda v, u: dist_loss(v, u, 4.0),
    "TTM": lambda v, u: ttm_loss(v, u, 10.0),
    "WTTM": lambda v, u: wttm_loss(v, u, 10.0),
    "MLKD": lambda v, u: mlkd_loss(v, u, (2.0, 6.0)),
    "SCD": lambda v, u: scd_loss(v, u, TARGET[: len(v)], 4.0),
    "MCD": lambda v, u: mcd_loss(v, u, TARGET[: len(v)], 4.0),
}
METHODS = {
    "LSKD": ("KD", ["EXPERIMENT.LOGIT_STAND", "True"]),
    "CTKD": ("CTKD", []),
    "CTKD instance": ("CTKD", ["TEMPERATURE.LEARNED.MODE", "instance"]),
    "CTKD standardised": ("CTKD", ["EXPERIMENT.LOGIT_STAND", "True"]),
    "MLKD": ("MLKD", []),
    "MLKD standardised": ("MLKD", ["EXPERIMENT.LOGIT_STAND", "True"]),
    "DIST": ("DIST", []),
    "NORMKD": ("NORMKD", []),
    "TTM": ("TTM", []),
    "WTTM": ("WTTM", []),
    "RLD": ("RLD", []),
}


def logits(seed=0, batch=6, classes=5, scale=4.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, classes, generator=generator, dtype=dtype)


class Net(nn.Module):
    """The smallest model that keeps the contract: (logits, feats)."""

    def __init__(self, classes, seed):
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, classes)
        self.register_buffer("weight", logits(seed, classes, 3 * 8 * 8, dtype=torch.float32) / 20)
        with torch.no_grad():
            self.fc.weight.copy_(self.weight)

    def forward(self, image):
        return self.fc(image.flatten(1)), {}


def build(name, classes=5):
    type_, opts = METHODS[name]
    return distiller_dict[type_](Net(classes, 1), Net(classes, 2), config.load(opts=opts)).train()


def np_softmax(x, temperature=1.0):
    e = np.exp(np.asarray(x) / temperature)
    return e / e.sum(-1, keepdims=True)


def np_kl(p, q):
    return (p * np.log(p / q)).sum(-1)


V, U = logits(0), logits(1)
NV, NU = V.numpy(), U.numpy()


def by_hand_lskd():
    z_v, z_u = ((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (NV, NU))
    return 4 * np_kl(np_softmax(z_u, 2), np_softmax(z_v, 2)).mean()


def by_hand_normkd():
    t_v, t_u = (2 * x.std(1, keepdims=True) for x in (NV, NU))
    return (t_u[:, 0] ** 2 * np_kl(np_softmax(NU, t_u), np_softmax(NV, t_v))).mean()


def by_hand_dist():
    q, p = np_softmax(NV, 4), np_softmax(NU, 4)
    inter = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(len(p))])
    intra = np.mean([1 - np.corrcoef(p[:, k], q[:, k])[0, 1] for k in range(p.shape[1])])
    return 16 * (inter + intra)


def by_hand_ttm(weighted):
    p, q = np_softmax(NU), np_softmax(NV)
    power = p**0.1
    weight = power.sum(1) if weighted else 1
    return (weight * np_kl(power / power.sum(1, keepdims=True), q)).mean()


def by_hand_mlkd():
    total = 0
    for t in (2, 6):
        q, p = np_softmax(NV, t), np_softmax(NU, t)
        total += t**2 * np_kl(p, q).mean()
        total += sum((p[a] @ p[b] - q[a] @ q[b]) ** 2 for a in range(6) for b in range(6)) / 6
        total += sum((p[:, a] @ p[:, b] - q[:, a] @ q[:, b]) ** 2 for a in range(5) for b in range(5)) / 5
    return total


def by_hand_scd():
    q, p = np_softmax(NV, 4), np_softmax(NU, 4)
    terms = []
    for i, true in enumerate(TARGET.tolist()):
        b_t, b_s = p[i].max(), q[i, true]
        terms.append(np_kl(np.array([b_t, 1 - b_t]), np.array([b_s, 1 - b_s])))
    return 16 * np.mean(terms)


def by_hand_mcd():
    terms = []
    for i, true in enumerate(TARGET.tolist()):
        rest = [k for k in range(5) if NU[i, k] < NU[i, true]]
        terms.append(np_kl(np_softmax(NU[i, rest], 4), np_softmax(NV[i, rest], 4)) if rest else 0.0)
    return 16 * np.mean(terms)


BY_HAND = {
    "LSKD": by_hand_lskd,
    "NORMKD": by_hand_normkd,
    "DIST": by_hand_dist,
    "TTM": lambda: by_hand_ttm(False),
    "WTTM": lambda: by_hand_ttm(True),
    "MLKD": by_hand_mlkd,
    "SCD": by_hand_scd,
    "MCD": by_hand_mcd,
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_papers_formula(name):
    assert LOSSES[name](V, U).item() == pytest.approx(BY_HAND[name](), rel=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_finite_differences(name):
    v = V[:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: LOSSES[name](v, U[:4]), v)


@pytest.mark.parametrize("name", ["LSKD", "NORMKD", "DIST", "TTM", "WTTM", "MLKD"])
def test_the_batchs_order_does_not_matter(name):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(LOSSES[name](V[order], U[order]), LOSSES[name](V, U))


def test_the_batchs_order_does_not_matter_to_rld():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = rld_loss(V[order], U[order], TARGET[order], 1.0, 8.0, 4.0)
    torch.testing.assert_close(shuffled, rld_loss(V, U, TARGET, 1.0, 8.0, 4.0))


@pytest.mark.parametrize("name", ["LSKD", "NORMKD", "DIST", "MLKD", "MCD"])
def test_identical_logits_cost_nothing(name):
    assert LOSSES[name](U, U).abs() < 1e-12
    assert LOSSES[name](V, U) > 0


def test_where_identical_logits_do_cost():
    right, wrong = U.argmax(1), U.argmin(1)
    assert scd_loss(U, U, right, 4.0).abs() < 1e-12
    assert scd_loss(U, U, wrong, 4.0) > 0
    for loss in (ttm_loss, wttm_loss):
        assert loss(U, U, 10.0) > 0
        assert loss(U / 10 + 3, U, 10.0).abs() < 1e-12
        assert loss(U, U, 1.0).abs() < 1e-12


def standardise(x):
    """The z-score of LSKD's Algorithm 1."""
    return (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)


def test_lskd_is_a_temperature_rule_over_kl():
    rule = std(V, U, 2.0)
    torch.testing.assert_close(rule.student, 2 * V.std(1, correction=0, keepdim=True))
    torch.testing.assert_close(kd_loss(V, U, 2.0, True), softened_kl(V, U, rule))
    torch.testing.assert_close(softened_kl(V, U, rule), kd_loss(standardise(V), standardise(U), 2.0))
    normalised = norm(V, U, 2.0)
    assert torch.equal(normalised.student, rule.student)
    torch.testing.assert_close(normalised.factor, rule.teacher**2)


def test_a_constant_row_falls_back_to_tau():
    v = V.clone()
    v[2] = 7.0
    rule = std(v, U, 2.0)
    assert rule.student[2] == 2.0
    assert (~rule.sound).nonzero().tolist() == [[2, 0]]
    assert deviation(v)[0][2] == 1.0


def test_the_power_sum_measures_smoothness():
    one_hot, uniform = torch.tensor([[1e4, 0.0, 0, 0]]), torch.zeros(1, 4)
    assert power_sum(one_hot, 10.0).item() == pytest.approx(1.0)
    assert power_sum(uniform, 10.0).item() == pytest.approx(4**0.9)


def test_correlation_is_blind_to_scale_and_defined_for_constants():
    x, y = logits(2), logits(3)
    torch.testing.assert_close(pearson(2 * x + 1, y, 1), pearson(x, y, 1))
    constant = torch.full_like(x, 0.2)
    assert torch.equal(pearson(constant, y, 1), torch.zeros(6, dtype=x.dtype))
    assert torch.equal(pearson(constant, constant, 0), torch.ones(5, dtype=x.dtype))


def test_rld_follows_the_teachers_confidence_not_its_mistake():
    u = torch.tensor([[5.0, 3.0, 1.0, 0.0]])  # the teacher says 0, the truth is 1
    target = torch.tensor([1])
    v = torch.zeros(1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(scd_loss(v, u, target, 1.0), v)
    confidence = torch.softmax(u, 1).max()
    assert gradient[0, 1].item() == pytest.approx((0.25 - confidence).item(), rel=1e-5)  # p_true - p_max
    (gradient,) = torch.autograd.grad(mcd_loss(v, u, target, 1.0), v)
    assert gradient[0, :2].eq(0).all()  # the mistaken class and the target are masked
    assert gradient[0, 2:].ne(0).all()


@pytest.mark.parametrize("target", [2, 3])
def test_nothing_or_one_class_left_teaches_no_correlation(target):
    u = torch.tensor([[5.0, 3.0, 1.0, 0.0]])
    v = torch.tensor([[1.0, -2.0, 4.0, 0.5]], requires_grad=True)
    loss = mcd_loss(v, u, torch.tensor([target]), 4.0)
    loss.backward()
    assert loss == 0
    assert v.grad.eq(0).all()


def test_the_curriculum_is_a_cosine_from_nothing_to_its_end():
    assert curriculum(0, 10, 1.0) == 0
    assert curriculum(5, 10, 1.0) == pytest.approx(0.5)
    assert curriculum(10, 10, 1.0) == curriculum(200, 10, 1.0) == 1
    assert curriculum(1, 0, 0.7) == 0.7
    values = [curriculum(epoch, 10, 1.0) for epoch in range(11)]
    assert values == sorted(values)


def test_the_temperature_stays_in_its_range():
    theta = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], requires_grad=True)
    t = learned_temperature(theta, 1.0, 20.0)
    torch.testing.assert_close(t[[0, 2, 4]], torch.tensor([1.0, 11.0, 21.0]))
    t.sum().backward()
    assert theta.grad.isfinite().all()


@pytest.mark.parametrize("classes", [None, 5])
def test_the_student_descends_and_the_temperature_climbs(classes):
    rule = LearnedTemperature(Net(5, 1), "instance" if classes else "global", lambda_epochs=0).double()
    parameters = list(rule.parameters())

    def loss(v, strength):
        rule.lambda_max = strength
        return softened_kl(v, U, rule(v, U, 4.0, epoch=1))

    def gradients(strength):
        v = V.clone().requires_grad_()
        return torch.autograd.grad(loss(v, strength), [v, *parameters])

    student, *plain = gradients(-1.0)  # the reversal undone
    for strength in (0.0, 0.3, 1.0):
        student_again, *reversed_ = gradients(strength)
        torch.testing.assert_close(student_again, student)  # the student never sees the reversal
        for a, b in zip(reversed_, plain, strict=True):
            torch.testing.assert_close(a, -strength * b)
    before = loss(V, 1.0).item()
    for parameter, gradient in zip(parameters, reversed_, strict=True):
        parameter.data -= 1e-3 * gradient
    assert loss(V, 1.0).item() > before


def test_the_learned_temperature_passes_a_gradient_check():
    rule = LearnedTemperature(Net(5, 1), lambda_max=-1.0, lambda_epochs=0).double()  # the reversal undone

    def loss(v, theta):
        temperatures = torch.func.functional_call(rule, {"theta": theta}, (v, U, 4.0), {"epoch": 1})
        return softened_kl(v, U, temperatures)

    theta = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (V.clone().requires_grad_(), theta))


def test_ctkd_hands_its_parameters_to_the_optimizer():
    for name, extra in (("CTKD", 1), ("CTKD instance", 10 * 5 + 5 + 5 + 1)):
        method = build(name)
        assert method.get_extra_parameters() == extra
        given = {id(p) for p in method.get_learnable_parameters()}
        assert given == {id(p) for p in (*method.student.parameters(), *method.rule.parameters())}
    with pytest.raises(UserError, match=r"TEMPERATURE\.LEARNED\.MODE: unknown value .* known: global, instance"):
        distiller_dict["CTKD"](Net(5, 1), Net(5, 2), config.load(opts=["TEMPERATURE.LEARNED.MODE", "sample"]))


@pytest.mark.parametrize("theta", [-1e4, 1e4])
def test_ctkd_at_the_ends_of_its_range(theta):
    method = build("CTKD")
    with torch.no_grad():
        method.rule.theta.fill_(theta)
    v, u = (1e30 * logits(seed, dtype=torch.float32) for seed in (0, 1))
    v.requires_grad_()
    losses = method.losses(v, u, TARGET, epoch=10)
    sum(losses.values()).backward()
    assert losses["loss_kd"].isfinite()
    assert v.grad.isfinite().all()
    assert method.rule.theta.grad.isfinite().all()


def corners():
    v, u = logits(0, dtype=torch.float32), logits(1, dtype=torch.float32)
    big = torch.finfo(torch.float32).max
    two = torch.tensor([[3.0, -1.0], [-2.0, -1.0]])
    one_row = v.clone()
    one_row[1] = 2.5
    return {
        "gigantic teacher": (v, 1e30 * u),
        "gigantic both": (1e30 * v, 1e30 * u),
        "largest floats": (torch.where(v > 0, big, -big), torch.where(u > 0, big, -big)),
        "opposite ends": (1e-9 * v, 1e30 * u),
        "one hot teacher": (v, F.one_hot(u.argmax(1), 5) * 1e6),
        "zero student": (torch.zeros_like(v), u),
        "zero both": (torch.zeros_like(v), torch.zeros_like(u)),
        "a zero row": (v * torch.tensor([1.0, 0, 1, 1, 1, 1])[:, None], u),
        "a constant row": (one_row, u),
        "far constant": (torch.full_like(v, -1e30), u),
        "tiny student": (1e-30 * v, u),
        "small spread": (1e-5 * v, u),
        "ties": (torch.ones_like(v), torch.ones_like(u)),
        "two classes": (two, -two),
        "batch of one": (v[:1], u[:1]),
        "bf16": (v.bfloat16(), (1e3 * u).bfloat16()),
        "fp16": (v.half(), u.half()),
    }


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("corner", corners())
@pytest.mark.parametrize("name", METHODS)
def test_every_finite_input_gives_finite_losses_and_gradients(name, corner, swap):
    v, u = corners()[corner]
    v, u = (u, v) if swap else (v, u)
    v, u = v.clone().requires_grad_(), u.clone().requires_grad_()
    method = build(name, v.shape[1])
    losses = method.losses(v, u, TARGET[: len(v)] % v.shape[1], epoch=20)
    assert set(losses) == {"loss_ce", "loss_kd"}
    for value in losses.values():
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert value >= -1e-4
    sum(losses.values()).backward()
    own = [p for p in method.get_learnable_parameters() if p.grad is not None]
    for leaf in (v, *own) if u.grad is None else (v, u, *own):
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("amp", [False, True])
def test_a_step_reaches_every_learnable_parameter_and_nothing_of_the_teacher(name, amp):
    method = build(name)
    image = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        out, losses = method(image=image, target=TARGET, index=torch.arange(6), epoch=5)
    assert out.shape == (6, 5)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    for parameter in method.get_learnable_parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0
    assert all(p.grad is None for p in method.teacher.parameters())


def test_autocast_does_not_reach_the_correlations():
    v, u = V.float(), U.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = correlation_losses(v, u, 4.0, 4.0)
    assert inside == correlation_losses(v, u, 4.0, 4.0)


@pytest.mark.parametrize("standardised", ["False", "True"])
def test_mlkd_counts_every_level_of_both_views(standardised):
    cfg = config.load(opts=["EXPERIMENT.LOGIT_STAND", standardised])
    method = distiller_dict["MLKD"](Net(5, 1), Net(5, 2), cfg).train()
    weak, strong = torch.randn(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    _, losses = method(image=weak, target=TARGET, index=torch.arange(6), epoch=1, image_strong=strong)
    scale = standardise if standardised == "True" else lambda x: x
    expected_ce = expected_kd = 0.0
    for view in (weak, strong):
        v, u = method.student(view)[0], method.teacher(view)[0]
        expected_ce = expected_ce + 0.1 * F.cross_entropy(v, TARGET)
        v, u = scale(v), scale(u)
        for t in (2.0, 3.0, 4.0, 5.0, 6.0):
            expected_kd = expected_kd + 0.9 * (kd_loss(v, u, t) + sum(correlation_losses(v, u, t, t)))
    torch.testing.assert_close(losses["loss_ce"], expected_ce)
    torch.testing.assert_close(losses["loss_kd"], expected_kd)


def test_the_strong_view_is_another_view_of_each_image():
    image = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    image = F.avg_pool2d(image, 5, 1, 2) * 5
    torch.manual_seed(0)
    view = strong_view(image)
    assert view.shape == image.shape
    assert view.is_contiguous(memory_format=torch.channels_last)
    assert view.isfinite().all()
    assert ((view - image).flatten(1).abs().amax(1) > 0.5).all()
    blank = (view == 0).all(1).float().mean((1, 2))  # of each image: a quarter, less what overhangs
    assert blank.min() >= 0.05
    assert blank.max() <= 0.3
    torch.manual_seed(0)
    assert torch.equal(strong_view(image), view)
    same = torch.ones(8, 3, 16, 16)
    assert strong_view(same).flatten(1).std(1).unique().numel() == 8  # each image has its own draw


def test_stored_teacher_logits_stand_for_the_teacher():
    for name in METHODS:
        method = build(name)
        image = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        stored = method.teacher(image)[0].detach()
        extra = {"image_strong": image.flip(3)} if name.startswith("MLKD") else {}
        plain = method.forward_train(image, TARGET, epoch=3, **extra)[1]
        cached = method.forward_train(image, TARGET, epoch=3, logits_teacher=stored, **extra)[1]
        for key in plain:
            torch.testing.assert_close(plain[key], cached[key])


def test_the_switch_leaves_the_cross_entropy_alone():
    plain, switched = distiller_dict["KD"](Net(5, 1), Net(5, 2), config.load()), build("LSKD")
    a, b = (method.losses(V, U, TARGET) for method in (plain, switched))
    assert torch.equal(a["loss_ce"], b["loss_ce"])
    torch.testing.assert_close(b["loss_kd"], 0.9 * kd_loss(standardise(V), standardise(U), 4.0))
    assert isinstance(plain, LogitDistiller)


@pytest.mark.parametrize("name", ["lskd", "ctkd", "mlkd", "dist", "normkd", "ttm", "wttm", "rld"])
def test_the_shipped_configurations_load(name):
    cfg = config.load(ROOT / "configs" / "cifar100" / name / "res32x4_res8x4.yaml")
    assert cfg.DISTILLER.TYPE.lower() == name.replace("lskd", "kd")
    assert cfg.EXPERIMENT.LOGIT_STAND is (name == "lskd")
    if name == "lskd":
        assert (cfg.KD.TEMPERATURE, cfg.KD.LOSS.KD_WEIGHT, cfg.KD.LOSS.CE_WEIGHT) == (2.0, 9.0, 0.1)


def test_a_method_without_a_standardised_form_refuses_the_switch(tmp_path):
    cfg = config.load(opts=["DISTILLER.TYPE", "TTM", "EXPERIMENT.LOGIT_STAND", "True", "DISTILLER.TEACHER", "resnet8"])
    data = types.SimpleNamespace(num_classes=10, train_labels=range(4))
    torch.save({"model": cifar_model_dict["resnet8"][0](num_classes=10).state_dict()}, tmp_path / "teacher.pth")
    with pytest.raises(UserError, match=r"LOGIT_STAND: TTM takes no temperature rule"):
        build_distiller(cfg, data, tmp_path / "teacher.pth", torch.device("cpu"))
