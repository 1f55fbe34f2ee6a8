"""A model made for inference alone gives what the plain model gives, and leaves it as it is."""

import copy
import functools

import pytest
import torch
from helpers import CPU, make_trainer, same
from torch import nn
from torch.nn import functional as F

from mdistiller.bank import inference as inference_module
from mdistiller.bank.inference import CapturedFunction, Inference
from mdistiller.bank.onednn import PackedConv, can_fuse
from mdistiller.dataset import images_together
from mdistiller.device import autocast, prepare
from mdistiller.distillers.base import Distiller, Vanilla
from mdistiller.engine.evaluator import has_default_test, scores_of
from mdistiller.models import cifar_model_dict, imagenet, imagenet_model_dict, resnetv2

FAMILIES = ["resnet8", "resnet8x4", "vgg8", "wrn_16_2", "MobileNetV2", "ShuffleV1", "ShuffleV2"]
ZOO = {name: cifar_model_dict[name][0] for name in (*FAMILIES, "resnet20", "wrn_40_2")}
ZOO |= {  # wide networks of so few blocks of each kind
    "ResNet18": functools.partial(resnetv2.ResNet, resnetv2.BasicBlock, (1, 2, 1, 1)),
    "ResNet50": functools.partial(resnetv2.ResNet, resnetv2.Bottleneck, (1, 2, 1, 1)),
    "imagenet/ResNet18": functools.partial(imagenet.ResNet, imagenet.BasicBlock, (1, 2, 1, 1)),
    "imagenet/MobileNetV1": imagenet_model_dict["MobileNetV1"],
}


def lively(model: nn.Module) -> nn.Module:
    """As after training, and worse: negative and zero scales, tiny variances."""
    torch.manual_seed(1)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, 0.5, 0.4)
        nn.init.normal_(norm.bias, 0, 0.3)
        nn.init.normal_(norm.running_mean, 0, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        with torch.no_grad():
            norm.weight[0], norm.weight[1] = 0, -1
            norm.running_var[2], norm.weight[2] = 1e-9, 1e-3
    return model


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(prepare(ZOO[name](num_classes=10), CPU))


def images(count: int, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def plain(model: nn.Module, image: torch.Tensor, amp: str = "none") -> torch.Tensor:
    with torch.no_grad(), autocast(CPU, amp):
        return copy.deepcopy(model).eval()(image)[0].float()


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_agrees_and_is_left_alone(name):
    model, image = build(name).train(), images(3, 16)
    before = copy.deepcopy(model.state_dict())
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    fast = Inference(model, CPU, "none", 16)
    logits = fast(image)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert same(model.state_dict(), before)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    assert_close(logits, plain(model, image))
    assert torch.equal(fast(image), logits)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    if name.startswith("wrn"):  # the norms that begin a block stand behind a sum, but for a widening first block's
        norms = (norms - 1) // 2 + (model.block1.layer[0].convShortcut is not None)
    assert fast.folded == norms
    if name in FAMILIES and can_fuse("bf16"):
        for amp, given in (("none", fast), ("bf16", Inference(model, CPU, "bf16", 16))):
            check_rows(model, given, amp)


def check_rows(model: nn.Module, fast: Inference, amp: str) -> None:
    """A row depends on nothing but itself, and rounding costs no more than in the plain model."""
    assert fast.fused == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    image = images(13, 16)
    exact, rounded = plain(model, image), plain(model, image, amp)
    others = torch.cat([torch.zeros(6, 3, 16, 16), image[6:]])
    logits, order = fast(image), torch.randperm(13)
    assert torch.equal(fast(image[order]), logits[order])
    assert torch.equal(fast(others)[6:], logits[6:])
    assert_close(logits, rounded, 5e-2 if amp == "bf16" else 1e-4)
    assert (logits - exact).norm() <= 1.5 * (rounded - exact).norm() + 1e-4 * exact.norm()


@pytest.mark.parametrize("broken", ["absent", "wrong", "raises"])
def test_without_sound_operators_the_folded_graph_runs(monkeypatch, broken):
    def forward(self, x, other=None):
        if broken == "raises":
            raise RuntimeError("no such primitive")
        return torch.zeros(())

    if broken == "absent":
        monkeypatch.setattr(inference_module, "can_fuse", lambda amp: False)
    else:
        monkeypatch.setattr(PackedConv, "forward", forward)
    model = build("resnet8")
    fast = Inference(model, CPU, "none")
    assert (fast.fused, fast.folded) == (0, 9)
    assert_close(fast(images(2)), plain(model, images(2)))


def test_it_has_the_weights_of_when_it_was_made_and_takes_images_of_any_size():
    model, image = build("vgg8"), images(2)
    fast = Inference(model, CPU, "none")
    for size in (16, 48, 64):
        assert_close(fast(images(2, size)), plain(model, images(2, size)))
    old = fast(image)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    assert torch.equal(fast(image), old)
    assert_close(Inference(model, CPU, "none")(image), old + 1)


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_not_a_number_is_not_hidden(amp):
    model, image = build("resnet8"), images(2)
    image[0, 0, 3, 3] = torch.nan
    assert Inference(model, CPU, amp)(image)[0].isnan().all()
    model.conv1.weight.data[0, 0, 0, 0] = torch.nan
    assert Inference(model, CPU, amp)(images(2)).isnan().all()


class Small(nn.Module):
    """Convolutions and BatchNorms for `route` to wire."""

    def __init__(self, route):
        super().__init__()
        self.stem, self.conv, self.bn, self.bn2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), *map(nn.BatchNorm2d, (8, 8))
        self.same, self.fc, self.route = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4), route

    def forward(self, image):
        x = self.route(self, F.relu(self.stem(image)))
        return self.fc(x.mean((2, 3))), {"feats": [x]}


def add_in_place(m, x):
    y = m.bn(m.same(x))
    x += y  # x is the stem's, whose output the line below reads
    return x + m.bn2(m.same(x))


def write_between(m, x):
    y = m.conv(x)
    x.mul_(2)
    return m.bn(y) + m.conv(x)


ROUTES = {  # route -> BatchNorms that may be folded
    "plain": (lambda m, x: m.bn(m.conv(x)), 1),
    "convolution twice": (lambda m, x: m.bn(m.same(m.bn2(m.same(x)))), 0),
    "norm twice": (lambda m, x: m.bn(m.conv(m.bn(m.same(x)))), 0),
    "two readers": (lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)), 0),
    "read before": (lambda m, x: (lambda y: m.bn(m.same(F.relu(y))) + F.relu(y))(m.bn2(m.same(x))), 0),
    "two norms": (lambda m, x: (lambda y: m.bn(y) * m.bn2(y))(m.conv(x)), 0),
    "sum with its own input": (lambda m, x: F.relu(m.bn(m.same(x)) + x), 1),
    "sum with itself": (lambda m, x: (lambda y: y + y)(m.bn(m.conv(x))), 1),
    "number": (lambda m, x: F.relu(m.bn(m.conv(x)) + 1.5), 1),
    "broadcast": (lambda m, x: m.bn(m.same(x)) + x.mean((2, 3), keepdim=True), 1),
    "alpha": (lambda m, x: torch.add(m.bn(m.same(x)), x, alpha=3), 1),
    "input read later": (lambda m, x: (lambda y: F.relu(m.same(y) + y) + y)(m.bn(m.conv(x))), 1),
    "x += y": (add_in_place, 0),
    "written between": (write_between, 0),
    "relu in place": (lambda m, x: (lambda y: F.relu(y, inplace=True) + y)(m.bn(m.conv(x))), 1),
}


@pytest.mark.parametrize("route", ROUTES)
def test_only_what_may_be_folded_is(route):
    torch.manual_seed(0)
    model = lively(Small(ROUTES[route][0]))
    for amp, tolerance in (("none", 1e-4), ("bf16", 3e-2)):
        fast = Inference(model, CPU, amp, 8)
        assert fast.folded == ROUTES[route][1]
        assert_close(fast(images(3, 8)), plain(model, images(3, 8)), tolerance)


class ByContent(Small):
    def forward(self, image):
        if image.sum() > 1e9:
            raise ArithmeticError
        return super().forward(image)


def test_a_model_that_cannot_be_traced_runs_as_it_is():
    torch.manual_seed(0)
    model = lively(ByContent(ROUTES["plain"][0])).train()
    model.bn.eval()
    modes, fast = [m.training for m in model.modules()], Inference(model, CPU, "none", 8)
    assert fast.folded == 0
    before, logits = copy.deepcopy(model.state_dict()), fast(images(3, 8))
    assert_close(logits, plain(model, images(3, 8)), 1e-6)
    assert not logits.requires_grad
    with pytest.raises(ArithmeticError):
        fast(images(3, 8) + 1e9)
    assert modes == [m.training for m in model.modules()]
    assert same(model.state_dict(), before)


def test_a_model_may_have_hooks_and_may_return_logits_alone():
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    model, image = prepare(lively(alone), CPU), images(3, 8)
    for folded in (1, 0):
        fast = Inference(model, CPU, "none", 8)
        assert fast.folded == folded
        assert_close(fast(image), plain(model, image))
        model[0].register_forward_hook(lambda _module, _inputs, output: 2 * output)


def test_a_captured_graph_serves_one_shape():
    calls = []

    def function(x):
        calls.append(tuple(x.shape))
        return 2 * x

    def capture(function, static):
        output = function(static)
        return output, lambda: output.copy_(2 * static)

    captured = CapturedFunction(function, capture)
    batches = [torch.full((4, 1), float(i)) for i in range(3)] + [torch.ones(2, 1)]
    outputs = [captured(x) for x in batches]
    assert all(torch.equal(y, 2 * x) for x, y in zip(batches, outputs, strict=True)), "no output is overwritten"
    assert calls == [(4, 1), (2, 1)]

    def fails(function, static):
        raise RuntimeError("operation not permitted when stream is capturing")

    captured = CapturedFunction(function, fails)
    assert torch.equal(captured(batches[2]), 2 * batches[2])
    assert torch.equal(captured(batches[3]), 2 * batches[3])


def test_images_together():
    assert images_together(64, 32, CPU) == 64
    assert images_together(64, 32, torch.device("cuda")) == 1000
    assert images_together(2048, 32, torch.device("cuda")) == 2048
    assert images_together(64, 224, torch.device("cuda")) == 64


class Doubled(Vanilla):
    def forward_test(self, image):
        return 2 * self.student(image)[0]


class AsBefore(Vanilla):
    """The plain path: its own method, the same logits."""

    def forward_test(self, image):
        return self.student(image)[0]


@pytest.mark.parametrize(("amp", "tolerance"), [("none", 1e-5), ("bf16", 2e-2)])
def test_evaluation_says_the_same(amp, tolerance):
    ours, before = (make_trainer("NONE", amp=amp, plugin=cls) for cls in (Vanilla, AsBefore))
    assert has_default_test(ours.distiller) and not has_default_test(before.distiller)
    a, b = ours.evaluate(), before.evaluate()
    assert a.loss == pytest.approx(b.loss, rel=tolerance)
    assert (a.top1, a.top5) == pytest.approx((b.top1, b.top5), abs=0 if amp == "none" else 5)


def test_a_methods_own_test_is_kept():
    trainer = make_trainer("NONE", plugin=Doubled)
    with torch.no_grad():
        expected = scores_of(lambda image: 2 * plain(trainer.distiller.student, image), trainer.test)
    assert trainer.evaluate() == expected
    assert has_default_test(Distiller(nn.Identity(), nn.Identity()))
