"""The feature methods and DKD: golden figures, the losses' properties, the mended faults, every pair that fits."""

import functools

import numpy as np
import pytest
import torch
from reference import golden, needs_reference
from torch import nn

from mdistiller import config
from mdistiller.distillers import distiller_dict
from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.features import get_feat_shapes, pooled_width, unit
from mdistiller.distillers.FitNet import hint_loss
from mdistiller.distillers.KDSVD import kdsvd_loss, leading_vectors
from mdistiller.distillers.losses import in_float32
from mdistiller.distillers.NST import nst_loss
from mdistiller.distillers.OFD import negative_mean, ofd_loss
from mdistiller.distillers.PKT import pkt_loss
from mdistiller.distillers.ReviewKD import hcl_loss
from mdistiller.distillers.RKD import rkd_loss
from mdistiller.distillers.SP import sp_loss
from mdistiller.distillers.VID import vid_loss
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict

METHODS = ("FITNET", "AT", "NST", "PKT", "KDSVD", "OFD", "RKD", "VID", "SP", "CRD", "REVIEWKD", "DKD")


def model(name: str, num_classes: int = 10) -> nn.Module:
    return cifar_model_dict[name][0](num_classes=num_classes)


def small(method: str, student: nn.Module | None = None, teacher: nn.Module | None = None, *opts: str) -> nn.Module:
    """The method in training, resnet14 -> resnet8 unless told otherwise; CRD over 20 samples of 10 classes."""
    cfg = config.load(None, ["CRD.NCE.K", "6", "CRD.FEAT.DIM", "8", *opts])
    extra = (20, torch.arange(20) % 10) if method == "CRD" else ()
    return distiller_dict[method](student or model("resnet8"), teacher or model("resnet14"), cfg, *extra).train()


def batch(size: int = 4) -> dict:
    torch.manual_seed(0)
    index = torch.arange(size)
    return {"image": torch.randn(size, 3, 32, 32), "target": index % 10, "index": index, "epoch": 3}


def maps(seed: int, *channels: int, size: int = 6, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, c, size >> i, size >> i, generator=generator, dtype=dtype) for i, c in enumerate(channels)]


def ofd(f_s: list, f_t: list) -> torch.Tensor:
    return sum(
        ofd_loss(s, t, -0.25 * torch.ones(1, t.shape[1], 1, 1, dtype=t.dtype)) for s, t in zip(f_s, f_t, strict=True)
    )


def dkd(f_s: list, f_t: list) -> torch.Tensor:
    v, u = f_s[0][:, :, 0, 0], f_t[0][:, :, 0, 0]
    return dkd_loss(v, u, u.argmin(1), 1.0, 8.0, 4.0)


def pooled(loss):
    return lambda f_s, f_t: loss(f_s[0].mean((2, 3)), f_t[0].mean((2, 3)))


LOSSES = {  # of two lists of maps (B, C, H, W)
    "FITNET": lambda f_s, f_t: hint_loss(f_s[0], f_t[0]),
    "AT": lambda f_s, f_t: at_loss(f_s, f_t, 2),
    "NST": nst_loss,
    "PKT": pooled(pkt_loss),
    "KDSVD": lambda f_s, f_t: kdsvd_loss(f_s, f_t, 1),
    "OFD": ofd,
    "RKD": pooled(rkd_loss),
    "SP": lambda f_s, f_t: sp_loss(f_s[0], f_t[0]),
    "REVIEWKD": hcl_loss,
    "DKD": dkd,
}
VIDS = {"VID": lambda f_s, f_t: vid_loss(f_s[0], f_t[0], torch.full((3,), 0.5, dtype=f_t[0].dtype), 1e-5)}
ANY_WIDTH = ("AT", "NST", "PKT", "KDSVD", "RKD", "SP")


@needs_reference
@pytest.mark.parametrize("key", [key[:-5] for key in golden() if "/DKD/" in key and key.endswith("/loss")])
def test_golden_dkd(key):
    figures = golden()
    case = key.rsplit("/", 2)[0]
    student, teacher, target = (
        torch.from_numpy(figures[f"{case}/{name}"]) for name in ("student", "teacher", "target")
    )
    student.requires_grad_()
    losses = small("DKD").losses(student, teacher, target, epoch=int(key.rsplit("/", 1)[1]))
    loss = sum(losses.values())
    loss.backward()
    np.testing.assert_allclose(loss.item(), figures[f"{key}/loss"], rtol=1e-3)
    reference = figures[f"{key}/grad"]
    np.testing.assert_allclose(student.grad, reference, rtol=1e-3, atol=1e-3 * np.abs(reference).max())


@pytest.mark.parametrize("name", LOSSES)
def test_zero_at_equality_and_positive_elsewhere(name):
    f_s, f_t = maps(1, 3, 5), maps(2, 3, 5)
    assert LOSSES[name](f_t, f_t).abs() < 1e-10
    assert LOSSES[name](f_s, f_t) > 1e-6


@pytest.mark.parametrize("name", LOSSES | VIDS)
def test_the_order_of_the_batch_does_not_matter(name):
    f_s, f_t = maps(1, 3, 5), maps(2, 3, 5)
    order = torch.tensor([2, 0, 3, 1])
    loss = (LOSSES | VIDS)[name]
    torch.testing.assert_close(loss([f[order] for f in f_s], [f[order] for f in f_t]), loss(f_s, f_t))


@pytest.mark.parametrize("name", LOSSES | VIDS)
def test_gradients_against_finite_differences(name):
    loss, f_t = (LOSSES | VIDS)[name], maps(2, 3, 5)
    f_s = [f.requires_grad_() for f in maps(1, 3, 5)]
    assert torch.autograd.gradcheck(lambda *f: loss(list(f), f_t), f_s, eps=1e-6, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ANY_WIDTH)
def test_widths_may_differ(name):
    assert LOSSES[name](maps(1, 4, 2), maps(2, 3, 5)).isfinite()


@pytest.mark.parametrize("name", ("AT", "NST", "KDSVD"))
def test_sizes_may_differ(name):
    assert LOSSES[name](maps(1, 3, 5, size=12), maps(2, 3, 5)).isfinite()
    assert LOSSES[name](maps(1, 3, 5), maps(2, 3, 5, size=12)).isfinite()


@pytest.mark.parametrize("name", LOSSES | VIDS)
@pytest.mark.parametrize("kind", ("zero", "identical", "tiny"))
def test_degenerate_features_give_finite_gradients(name, kind):
    f_t = maps(2, 3, 5, dtype=torch.float32)
    f_s = maps(1, 3, 5, dtype=torch.float32)
    if kind == "identical":
        f_s = [f[:1].expand_as(f).clone() for f in f_s]
    else:
        f_s = [f * {"zero": 0.0, "tiny": 1e-20}[kind] for f in f_s]
    for f in f_s:
        f.requires_grad_()
    loss = (LOSSES | VIDS)[name](f_s, f_t)
    loss.backward()
    grads = [f.grad for f in f_s if f.grad is not None]
    assert loss.isfinite()
    assert all(grad.isfinite().all() and grad.abs().max() < 1e6 for grad in grads)


@pytest.mark.parametrize("name", LOSSES | VIDS)
def test_losses_stay_in_float32_under_autocast(name):
    loss = (LOSSES | VIDS)[name]
    half = [[f.bfloat16() for f in maps(seed, 3, 5)] for seed in (1, 2)]
    whole = [[f.float() for f in side] for side in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if name in ("PKT", "RKD"):  # the mean that pools is the model's business, not the loss's
            half = whole
        got = loss(*half)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(*whole))


def test_in_float32_reaches_lists_and_keywords():
    seen = in_float32(lambda a, *, b: (a[0].dtype, b.dtype))(
        [torch.ones(1, dtype=torch.float16)], b=torch.ones(1, dtype=torch.float64)
    )
    assert seen == (torch.float32, torch.float64)


def test_unit_leaves_zero_alone():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    y = unit(x, 1)
    torch.testing.assert_close(y, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    y.sum().backward()
    assert x.grad.abs().max() <= 1


def test_rkd_is_exact_for_features_that_lie_close_together():
    f_s, f_t = (100 + 1e-2 * f.mean((2, 3)) for f in (maps(1, 64)[0], maps(2, 64)[0]))
    torch.testing.assert_close(
        rkd_loss(f_s.float(), f_t.float()).double(),
        rkd_loss(f_s.float().double(), f_t.float().double()),
        rtol=1e-3,
        atol=0,
    )


def test_dkd_is_kd_in_two_parts():
    """Eq. 6: KL = TCKD + (1 - p_t) NCKD, so alpha 1 and beta 1 - p_t give KD for one sample."""
    torch.manual_seed(0)
    v, u = torch.randn(1, 7, dtype=torch.float64), torch.randn(1, 7, dtype=torch.float64)
    target, tau = torch.tensor([2]), 3.0
    p = (u / tau).softmax(1)
    kl = (p * (p.log() - (v / tau).log_softmax(1))).sum() * tau**2
    torch.testing.assert_close(dkd_loss(v, u, target, 1.0, 1 - p[0, 2].item(), tau), kl)


@pytest.mark.parametrize("scale", (0.0, 1e4, 1e30))
def test_dkd_is_finite_at_the_extremes(scale):
    v = (torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * scale).requires_grad_()
    u = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)) * scale
    loss = dkd_loss(v, u, torch.arange(6), 1.0, 8.0, 4.0)
    loss.backward()
    assert loss.isfinite()
    assert v.grad.isfinite().all()


def test_margins_are_the_mean_of_the_negative_part():
    bn = nn.BatchNorm2d(4)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 0.1]))
        bn.bias.copy_(torch.tensor([0.0, 0.5, -1.0, 1.0]))
    x = bn.bias + bn.weight * torch.randn(1_000_000, 4, generator=torch.Generator().manual_seed(0))
    want = (x * (x < 0)).sum(0) / (x < 0).sum(0).clamp(min=1)
    margin = negative_mean(bn).flatten()
    torch.testing.assert_close(margin[:3], want[:3].detach(), rtol=5e-3, atol=0)
    assert margin[3] == pytest.approx(-0.3)  # ten deviations above zero: nothing is negative


def test_ofd_forgives_a_source_below_a_negative_target():
    target, margin = torch.tensor([-2.0, -0.5, 1.0]).view(1, 3, 1, 1), torch.full((1, 3, 1, 1), -1.0)
    source = torch.tensor([-3.0, -1.0, 0.0]).view(1, 3, 1, 1)
    assert ofd_loss(source, target, margin) == 1  # only the positive target is missed
    assert ofd_loss(source + 3, target, margin) == 1 + 2.5**2 + 2**2


def test_leading_vectors_of_a_rank_deficient_map():
    f = torch.zeros(2, 3, 4, 4)
    f[0, :, :, 0] = 1
    f.requires_grad_()
    values, vectors = leading_vectors(f, 2)
    torch.testing.assert_close(values[0], torch.tensor([1.0, 0.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(vectors[0, :, 0], torch.tensor([1.0, 0, 0, 0]))
    vectors.square().sum().backward()
    assert f.grad.isfinite().all()


def test_vid_log_scales_are_trained_saved_and_counted_apart():
    distiller = small("VID")
    names = [name for name, _ in distiller.named_parameters() if name.startswith("log_scales")]
    assert len(names) == 3
    assert set(names) <= set(distiller.state_dict())
    learnable = {id(p) for p in distiller.get_learnable_parameters()}
    for log_scale in distiller.log_scales:
        assert id(log_scale) in learnable
        torch.testing.assert_close(nn.functional.softplus(log_scale) + 1e-5, torch.full_like(log_scale, 5.0))
    _, losses = distiller(**batch())
    sum(losses.values()).backward()
    assert all(log_scale.grad.abs().sum() > 0 for log_scale in distiller.log_scales)
    assert distiller.get_extra_parameters() == 3 * (16**2 + 32**2 + 64**2)


def test_probing_restores_each_modules_mode():
    student, teacher = model("resnet8").train(), model("resnet14").train()
    teacher.layer1.eval()
    get_feat_shapes(student, teacher, (32, 32))
    assert student.training and teacher.layer2[0].bn1.training and not teacher.layer1[0].bn1.training
    assert pooled_width(model("MobileNetV2")) == 1280


PAIRS = (
    ("resnet14", "resnet8"),
    ("resnet8x4", "resnet8"),
    ("wrn_16_2", "wrn_16_1"),
    ("vgg11", "vgg8"),
    ("vgg8", "MobileNetV2"),
    ("ResNet18", "MobileNetV2"),
    ("resnet8x4", "ShuffleV1"),
    ("resnet8x4", "ShuffleV2"),
    ("wrn_16_2", "ShuffleV1"),
    ("resnet8", "MobileNetV2"),  # three stages against four
    ("ResNet18", "resnet8"),  # four against three
    ("vgg8", "resnet8"),  # the student's maps are the larger ones
    ("ShuffleV1", "vgg8"),
    ("ShuffleV2", "resnet8"),
)
REFUSED = {("OFD", "ShuffleV2", "resnet8"): "covers 58 of 116 channels"}


@functools.cache
def shared(name: str, side: str) -> nn.Module:
    torch.manual_seed(0)
    return model(name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_pair(method, teacher, student):
    t, s = shared(teacher, "teacher"), shared(student, "student")
    if reason := REFUSED.get((method, teacher, student)):
        with pytest.raises(UserError, match=rf"^{method}: \w+ -> \w+: .*{reason}$"):
            small(method, s, t)
        return
    distiller = small(method, s, t)
    logits, losses = distiller(**batch())
    assert logits.shape == (4, 10)
    assert all(loss.isfinite() for loss in losses.values())
    grads = torch.autograd.grad(losses["loss_kd"], distiller.get_learnable_parameters(), allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)
    assert any(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_fitnet_refuses_a_map_it_cannot_reach():
    with pytest.raises(UserError, match=r"^FITNET: ResNet -> MobileNet: no regressor from a 4 x 4 map to 16 x 16.*$"):
        t, s = model("resnet8"), model("MobileNetV2")
        s.conv1[0].stride = (4, 4)
        small("FITNET", s, t)
    with pytest.raises(UserError, match="HINT_LAYER 4 must be 0 to 3"):
        small("FITNET", None, None, "FITNET.HINT_LAYER", "4")


def test_reviewkd_reads_or_checks_the_widths():
    typed = ["REVIEWKD.IN_CHANNELS", "[16, 32, 64, 64]", "REVIEWKD.OUT_CHANNELS", "[16, 32, 64, 64]"]
    sizes = ["REVIEWKD.SHAPES", "[1, 8, 16, 32]", "REVIEWKD.OUT_SHAPES", "[1, 8, 16, 32]"]
    read, given = small("REVIEWKD"), small("REVIEWKD", None, None, *typed, *sizes)
    given.load_state_dict(read.state_dict())
    with torch.no_grad():
        a, b = (d(**batch())[1]["loss_kd"] for d in (read, given))
    torch.testing.assert_close(a, b)
    with pytest.raises(UserError, match=r"IN_CHANNELS \[8, 8, 8, 8\] must be \[16, 32, 64, 64\]"):
        small("REVIEWKD", None, None, "REVIEWKD.IN_CHANNELS", "[8, 8, 8, 8]")
    with pytest.raises(UserError, match="SHAPES needs 4 sizes"):
        small("REVIEWKD", None, None, "REVIEWKD.SHAPES", "[1, 8]")
    with pytest.raises(UserError, match="OUT_SHAPES needs 4 sizes"):
        small("REVIEWKD", None, None, "REVIEWKD.OUT_SHAPES", "[1, 8, 16, 'wide']")


def test_bad_settings_are_refused():
    for method, key, value in (
        ("CRD", "CRD.MODE", "loose"),
        ("KDSVD", "KDSVD.K", "0"),
        ("OFD", "OFD.CONNECTOR.KERNEL_SIZE", "2"),
        ("VID", "VID.INIT_PRED_VAR", "0.0"),
    ):
        with pytest.raises(UserError, match=key.split(".")[1]):
            small(method, None, None, key, value)
