"""One contract over the whole zoo, and the reference's keys and figures."""

import copy
import math

import numpy as np
import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from mdistiller.device import autocast, prepare
from mdistiller.models import cifar_model_dict, imagenet_model_dict

GOLDEN = reference.golden()
KEYS = reference.state_dict_keys()
ZOO = [(name, constructor) for name, (constructor, _) in cifar_model_dict.items()]
IMAGENET = [(f"imagenet/{name}", constructor) for name, constructor in imagenet_model_dict.items()]


def test_the_zoo_is_complete():
    assert set(cifar_model_dict.own) == set(
        "resnet8 resnet14 resnet20 resnet32 resnet44 resnet56 resnet110 resnet8x4 resnet32x4 ResNet18 ResNet50 "
        "wrn_16_1 wrn_16_2 wrn_40_1 wrn_40_2 vgg8 vgg11 vgg13 vgg16 vgg19 MobileNetV2 ShuffleV1 ShuffleV2".split()
    )
    path = cifar_model_dict["resnet32x4"][1]
    assert path == "download_ckpts/cifar_teachers/resnet32x4_vanilla/ckpt_epoch_240.pth"


@pytest.mark.parametrize(("name", "constructor"), ZOO + IMAGENET, ids=lambda v: v if isinstance(v, str) else "")
def test_contract(name, constructor):
    torch.manual_seed(0)
    model = constructor(num_classes=7)
    runs, outputs = {}, {}
    for key, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):

            def count(module, _inputs, output, key=key):
                runs[key] = runs.get(key, 0) + 1
                outputs[module] = output

            module.register_forward_hook(count)
    logits, feats = model.train()(torch.randn(3, 3, 32, 32))

    norms = [key for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert runs == dict.fromkeys(norms, 1), "each BatchNorm runs exactly once"
    assert logits.shape == (3, 7)
    stages, preacts, pooled = feats["feats"], feats["preact_feats"], feats["pooled_feat"]
    assert [f.shape[1] for f in stages] == model.get_stage_channels()
    assert [p.shape for p in preacts] == [f.shape for f in stages]
    assert preacts[0] is stages[0]
    before_relu = model.get_bn_before_relu()
    assert len(before_relu) == len(stages) - 1

    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    assert torch.equal(classifier(pooled), logits)
    for stage, preact, norm in zip(stages[1:], preacts[1:], before_relu, strict=True):
        if name.startswith("wrn"):
            assert torch.equal(preact, outputs[norm])
        elif name == "MobileNetV2":
            assert preact is stage
            assert norm.num_features == stage.shape[1]
        elif name == "ShuffleV2":
            half = stage.shape[1] // 2
            assert torch.equal(preact[:, half:], outputs[norm])
            assert torch.equal(F.relu(preact)[:, :half], stage[:, 0::2])
            assert torch.equal(F.relu(preact)[:, half:], stage[:, 1::2])
        else:
            assert torch.equal(F.relu(preact), stage)
            assert norm.num_features == stage.shape[1]
    if name.startswith(("wrn", "resnet", "vgg")) or name == "ResNet18":
        head = F.relu(preacts[-1])
        torch.testing.assert_close(head.mean((2, 3)), pooled)

    loss = logits.sum() + sum(f.sum() for f in stages + preacts)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("name", ["resnet20", "ResNet18", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_other_image_sizes(name, size):
    model = cifar_model_dict[name][0](num_classes=4).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, size, size))[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "layer", "std"),
    [
        ("resnet20", "layer3.2.conv2", math.sqrt(2 / (9 * 64))),  # He: fan-out
        ("ResNet50", "layer2.0.conv2", math.sqrt(2 / (9 * 128))),
        ("wrn_40_2", "block3.layer.1.conv1", math.sqrt(2 / (9 * 128))),
        ("vgg13", "block3.0", math.sqrt(2 / (9 * 512))),
        ("MobileNetV2", "blocks.5.1.conv.3", math.sqrt(2 / (9 * 480))),  # depthwise: fan-out over all channels
        ("MobileNetV2", "classifier.0", 0.01),
    ],
)
def test_initialisation(name, layer, std):
    torch.manual_seed(0)
    weight = cifar_model_dict[name][0](num_classes=100).get_submodule(layer).weight
    assert weight.std().item() == pytest.approx(std, rel=0.05)


@reference.needs_reference
@pytest.mark.parametrize(("name", "constructor"), ZOO + IMAGENET, ids=lambda v: v if isinstance(v, str) else "")
def test_reference_keys_and_shapes(name, constructor):
    with torch.device("meta"):
        model = constructor(num_classes=1000 if name.startswith("imagenet/") else 100)
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == KEYS[name]


@reference.needs_reference
@pytest.mark.parametrize("name", sorted({key.split("/")[1] for key in GOLDEN if key.startswith("model/")}))
def test_golden_figures(name):
    model = reference.fill(cifar_model_dict[name][0](num_classes=100)).eval()
    with torch.no_grad():
        logits, feats = model(reference.images())
    train_logits, _ = model.train()(reference.images())
    F.cross_entropy(train_logits, reference.labels()).backward()
    ours = {
        "logits": logits,
        "pooled": feats["pooled_feat"],
        "feat_shapes": [f.shape for f in feats["feats"]],
        "feat_means": [f.mean() for f in feats["feats"]],
        "preact_means": [f.mean() for f in feats["preact_feats"]],
        "stage_channels": model.get_stage_channels(),
        "bn_before_relu": [norm.num_features for norm in model.get_bn_before_relu()],
        "train_logits": train_logits.detach(),
        "gradnorm": torch.stack([p.grad.norm() for p in model.parameters()]).norm(),
    }
    recorded = [key.split("/")[2] for key in GOLDEN if key.startswith(f"model/{name}/")]
    assert set(recorded) <= set(ours)
    for key in recorded:
        np.testing.assert_allclose(np.asarray(ours[key]), GOLDEN[f"model/{name}/{key}"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("stride", "size"), [(2, 8), (1, 2), (1, 8)])
def test_depthwise_convolutions_under_bf16_give_what_float32_gives(stride, size):
    """Those that bfloat16 would slow down run in float32, in training alone; copies have weights of their own."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    conv = nn.Conv2d(16, 16, 3, stride, 1, groups=16, bias=False)
    network = nn.Sequential(conv)
    plain = copy.deepcopy(conv)
    prepare(network, device)
    network._forward_hooks.clear()  # of logits, which these are not
    x = torch.randn(4, 16, size, size)
    image = x.clone().requires_grad_()
    with autocast(device, "bf16"):
        out = network(image)
        with torch.no_grad():
            still = network(image)
    assert out.dtype == still.dtype == torch.bfloat16
    out.float().square().sum().backward()
    exact = x.clone().requires_grad_()
    expected = plain(exact)
    expected.square().sum().backward()
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(still, out, rtol=0.02, atol=0.02)
    torch.testing.assert_close(image.grad, exact.grad, rtol=0.05, atol=0.05)
    torch.testing.assert_close(conv.weight.grad, plain.weight.grad, rtol=0.05, atol=0.5)
    other = copy.deepcopy(network)
    nn.init.zeros_(other[0].weight)
    assert not other(x).any() and network(x).any()
    torch.testing.assert_close(network(x), plain(x))
    assert list(network.state_dict()) == ["0.weight"]
