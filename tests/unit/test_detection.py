"""Detectors and the methods on them: a step of each, what is drawn, what is compared, what is refused."""

import functools
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, ROOT, refused, same
from torch.nn import functional as F

from mdistiller.dataset import load_dataset
from mdistiller.distillers import RuleDistiller, detection_takers, distiller_dict
from mdistiller.distillers.CWD import cwd_loss
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.PKD import pkd_loss
from mdistiller.engine.cfg import load
from mdistiller.engine.method import build_distiller
from mdistiller.engine.refusals import refuse_unused
from mdistiller.engine.solver import sgd
from mdistiller.engine.step import Step
from mdistiller.engine.teachers import find_teacher
from mdistiller.errors import UserError
from mdistiller.models import build_model
from mdistiller.models._frozen import freeze
from mdistiller.models.detectors import Sampler, of_rows
from mdistiller.runs import checkpoint

SCENES = ["DATASET.TYPE", "scenes", "DATASET.SCENES.TRAIN", "8", "DATASET.SCENES.TEST", "2", "DATASET.SIZE", "64"]
PAIR = ["DISTILLER.STUDENT", "fasterrcnn_resnet8", "DISTILLER.TEACHER", "fasterrcnn_resnet14"]


@functools.cache
def scenes():
    return load_dataset("scenes", ".", configured().DATASET)


def configured(*pairs):
    return load(None, [*SCENES, *PAIR, *pairs])


def built(method, *pairs):
    torch.manual_seed(0)
    return build_distiller(configured("DISTILLER.TYPE", method, *pairs), scenes(), None, CPU).train()


def batch(rows=slice(0, 4)):
    batches = scenes().training_batches(configured("SOLVER.BATCH_SIZE", "4"))
    plan = batches.plan(1)[:, :4]
    return batches.batch(plan, None if rows == slice(0, 4) else torch.arange(4)[rows])


@pytest.mark.parametrize("method", detection_takers(proposals=True))
def test_a_step_reaches_every_learnable_parameter_and_nothing_of_the_teacher(method):
    distiller = built(method)
    before = [value.clone() for value in distiller.teacher.parameters()] if distiller.teacher else []
    none, losses = distiller(**batch()._asdict(), epoch=2)
    assert none is None
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    assert ("loss_kd" in losses) is distiller.needs_teacher
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.get_learnable_parameters())
    if before:
        assert same(before, list(distiller.teacher.parameters()))
        assert all(p.grad is None for p in distiller.teacher.parameters())


@pytest.mark.parametrize("method", ["KD", "DKD"])
def test_proposals_are_compared_by_the_classification_losses(method):
    distiller, seen = built(method), {}
    train_on = distiller.student.train_on
    distiller.student.train_on = lambda *given: seen.setdefault("pass", train_on(*given))
    _, losses = distiller(**batch()._asdict(), epoch=40)
    found = seen["pass"]
    with torch.no_grad():
        levels = distiller.teacher.backbone(found.images)
        pooled = distiller.teacher.roi_heads.box_roi_pool(levels, found.proposals, found.sizes)
        teacher, _ = distiller.teacher.roi_heads.box_predictor(distiller.teacher.roi_heads.box_head(pooled))
    own = found.logits
    assert len(own) == len(teacher) == len(found.labels) == 4 * 64
    if method == "KD":
        expected = 0.9 * kd_loss(own, teacher, 4.0)
        assert losses["loss_ce"].allclose(0.1 * F.cross_entropy(own, found.labels))
    else:
        expected = dkd_loss(own, teacher, found.labels, 1.0, 8.0, 4.0)
    assert losses["loss_kd"].allclose(expected)
    assert "loss_classifier" not in losses, "it is loss_ce"


def test_a_rule_and_its_record_see_proposals():
    distiller, rows = built("KD", "TEMPERATURE.RULE", "std"), []
    given = batch()
    distiller.observer = lambda own, other, temperatures: rows.append((own, temperatures.student))
    distiller(**given._asdict(), epoch=1)
    ((logits, temperature),) = rows
    assert logits.shape == (4, 11) and temperature.shape == (4, 1), "one proposal of each image"


def test_identical_pyramids_cost_nothing():
    maps = torch.randn(2, 3, 5, 4)
    assert cwd_loss(maps, maps, 1.0) == 0 and pkd_loss(maps, maps) == 0
    scaled = 3 * maps + torch.randn(3)[:, None, None]
    assert float(pkd_loss(scaled, maps)) == pytest.approx(0, abs=1e-5), "Pearson knows neither scale nor shift"
    assert float(pkd_loss(-maps, maps)) == pytest.approx(2, abs=1e-4)
    shifted = maps + torch.randn(2, 3, 1, 1)
    assert float(cwd_loss(shifted, maps, 1.0)) == pytest.approx(0, abs=1e-5)
    assert cwd_loss(-maps, maps, 1.0) > 0.1
    constant = torch.ones(2, 3, 5, 4, requires_grad=True)
    pkd_loss(constant, maps).backward()
    assert constant.grad.isfinite().all()


def test_what_is_drawn_of_an_image_depends_on_its_seed_alone():
    labels = [torch.randint(-1, 3, (200,), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    sampler = Sampler(32, 0.25)
    sampler.seeds = [5, 6, 7]
    positive, negative = sampler(labels)
    sampler.seeds = [7]
    alone = sampler(labels[2:])
    assert torch.equal(alone[0][0], positive[2]) and torch.equal(alone[1][0], negative[2])
    for mask, no, label in zip(positive, negative, labels, strict=True):
        assert int(mask.sum()) == 8 and int(no.sum()) == 24
        assert (label[mask.bool()] >= 1).all() and (label[no.bool()] == 0).all()
    sampler.seeds = [1]
    few, rest = sampler([torch.tensor([1, 0, 0, -1])])
    assert few[0].tolist() == [1, 0, 0, 0] and rest[0].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("method", ["NONE", "DKD", "CWD", "REVIEWKD"])
def test_parts_of_a_batch_add_up_to_it(method):
    """As two processes, or two accumulated parts, see it: the mean of both parts' losses is the batch's."""
    distiller = built(method)
    for module in distiller.modules():  # whose statistics are of what one process has
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    losses = [sum(distiller(**batch(rows)._asdict(), epoch=1)[1].values()) for rows in (slice(0, 4), slice(0, 1))]
    rest = sum(distiller(**batch(slice(1, 4))._asdict(), epoch=1)[1].values())
    parts = (0.25 * losses[1] + 0.75 * rest).item()
    assert losses[0].item() == pytest.approx(parts, rel=1e-5)


def test_a_step_of_the_engine_moves_the_student_and_counts_images():
    distiller = built("DKD")
    step = Step(distiller, sgd(distiller.get_learnable_parameters(), 0.9, 0.0), CPU)
    step.optimizer.param_groups[0]["lr"] = 0.01
    before = [value.clone() for value in distiller.student.parameters()]
    step(batch(), 1)
    figures = step.meter.read()
    assert step.meter.images == 4 and figures["skipped"] == 0 and "correct" not in figures
    assert not same(before, list(distiller.student.parameters()))


def one_line(*pairs):
    cfg = configured(*pairs)
    refuse_unused(cfg)
    build_distiller(cfg, scenes(), None, CPU)


SOFT = sorted(
    {*detection_takers(proposals=True)} & {n for n, c in distiller_dict.items() if issubclass(c, RuleDistiller)}
)
RETINA = ["DISTILLER.STUDENT", "retinanet_resnet8", "DISTILLER.TEACHER", "retinanet_resnet14"]


@pytest.mark.parametrize(
    ("pairs", "part"),
    [
        (["DATASET.TYPE", "cifar100", "DISTILLER.TEACHER", "resnet8"], "is a detector; set DATASET.TYPE"),
        (
            ["DISTILLER.STUDENT", "resnet8"],
            "the model resnet8 is a classifier; unknown detector 'resnet8'; did you mean fcos_resnet8",
        ),
        (["DISTILLER.STUDENT", "tv:fasterrcnn_resnet19_fpn"], "near it"),
        (["DISTILLER.TYPE", "CRD"], "CRD has no form for detectors"),
        (["DISTILLER.TYPE", "AT"], "AT has no form for detectors"),
        (["DISTILLER.TYPE", "KD", *RETINA], "has a sigmoid for each class, and KD compares softmax outputs"),
        (
            ["DISTILLER.TYPE", "CWD", "DISTILLER.TEACHER", "tv:fasterrcnn_mobilenet_v3_large_fpn"],
            "CWD: tv:fasterrcnn_mobilenet_v3_large_fpn -> fasterrcnn_resnet8: the student's pyramid has levels of",
        ),
        (["DISTILLER.TYPE", "CWD", *RETINA[:3], "tv:retinanet_resnet18_fpn"], "take networks with the same levels"),
        (["DISTILLER.TYPE", "CWD", "TEMPERATURE.RULE", "std"], f"leave it out, or use {'.*'.join(SOFT)}"),
        (["DISTILLER.TYPE", "CWD", *RETINA, "TEMPERATURE.RULE", "std"], "which no temperature softens; leave it out"),
        (["DISTILLER.STUDENT_CKPT", "pretrained"], "for fasterrcnn_resnet8; leave it out"),
        (["DISTILLER.STUDENT_CKPT", "trunk"], "no weights of a detector's trunk for fasterrcnn_resnet8; leave it out"),
        (["DISTILLER.TYPE", "KD", "TEACHER_BANK", "full"], "set TEACHER_BANK auto"),
        (["SOLVER.LABEL_SMOOTHING", "0.1"], "SOLVER.LABEL_SMOOTHING: is for images of one class each"),
        (["SOLVER.STEP", "compile"], "set SOLVER.STEP auto"),
        (["DISTILLER.TYPE", "KD", "TEACHER_BANK_TOP_K", "8"], "TEACHER_BANK_TOP_K: is for images of one class each"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(pairs, part):
    with refused(part):
        one_line(*pairs)


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_sigmoid_heads_learn_from_pyramids(kind):
    names = ["DISTILLER.STUDENT", f"{kind}_resnet8", "DISTILLER.TEACHER", f"{kind}_resnet8x2"]
    distiller = built("PKD", *names)
    _, losses = distiller(**batch()._asdict(), epoch=1)
    assert "loss_kd" in losses and sum(losses.values()).isfinite()


def test_weights_of_coco_are_cut_to_its_categories():
    logits, boxes = "cls_logits.weight", "box_predictor.bbox_pred.bias"
    own = {logits: torch.zeros(9 * 3, 2), boxes: torch.zeros(3 * 4)}
    wide = {logits: torch.arange(9 * 91 * 2.0).view(-1, 2), boxes: torch.arange(364.0)}
    found = of_rows(wide, own, [0, 1, 5])
    assert found[logits][:4, 0].tolist() == [0, 2, 10, 182]
    assert found[boxes].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 20, 21, 22, 23]


@pytest.mark.parametrize("name", ["fasterrcnn_resnet8", "fcos_resnet8"])
def test_weights_for_other_classes_need_a_new_head(name, tmp_path):
    torch.manual_seed(1)
    file, own = tmp_path / "weights.pth", build_model(name, 4, "scenes")
    checkpoint.save({"model": build_model(name, 7, "scenes").state_dict()}, file)
    with refused("set DISTILLER.NEW_HEAD True"):
        checkpoint.load_weights(own, name, 4, file, False)
    before = {key: value.clone() for key, value in own.state_dict().items()}
    checkpoint.load_weights(own, name, 4, file, True)
    changed = {key for key, value in own.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(key.startswith(own.heads) for key in changed)
    assert {"backbone.body.stem.0.weight", "backbone.fpn.layer_blocks.0.0.weight"} <= changed


@functools.cache
def drawn(name):
    """Weights for the network of torchvision that is called so."""
    from torchvision.models import get_model

    with torch.device("meta"):
        state = get_model(name, weights=None, **({"weights_backbone": None} if "fpn" in name else {})).state_dict()
    torch.manual_seed(3)
    return {key: drawn_like(value) for key, value in state.items()}


def drawn_like(value):
    if value.ndim > 1:
        return torch.randn(value.shape) / value[0].numel() ** 0.5
    return torch.rand(value.shape).add(0.5).to(value.dtype)  # a norm's variance is above zero


@pytest.fixture
def drawn_weights(monkeypatch):
    """Torchvision's weights are drawn instead of fetched, and what else a network has begins at zero, which is fast."""
    from torchvision.models import WeightsEnum

    def get_state_dict(self, **given):
        return dict(drawn(type(self).__name__.removesuffix("_Weights").lower()))

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    for name in ("kaiming_uniform_", "kaiming_normal_", "uniform_", "normal_", "trunc_normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *given, **more: tensor.data.zero_())


def data_of(classes):
    return SimpleNamespace(classes=classes, views=SimpleNamespace(short=800, long=1333))


@pytest.mark.usefixtures("drawn_weights")
def test_a_student_of_coco_begins_with_its_trunk_s_weights():
    from torchvision.models import ResNet50_Weights

    name = "tv:fasterrcnn_resnet50_fpn"
    cfg = load(ROOT / "configs/coco/dkd/r101_r50.yaml")
    network = build_model(name, 81, "coco")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    checkpoint.load_weights(network, name, 81, cfg.DISTILLER.STUDENT_CKPT)
    trunk = ResNet50_Weights.IMAGENET1K_V1.get_state_dict()
    for key, value in network.state_dict().items():
        inside = key.startswith("backbone.body.")
        assert torch.equal(value, trunk[key.removeprefix("backbone.body.")] if inside else before[key]), key
    assert not is_whole(cfg.DISTILLER.TEACHER)


def is_whole(name):
    return build_model(name, 3, "coco").fetch is not None


@pytest.mark.usefixtures("drawn_weights")
def test_coco_s_heads_are_for_coco_s_classes():
    from torchvision.models import get_model_weights

    categories = get_model_weights("retinanet_resnet50_fpn").DEFAULT.meta["categories"]
    own = tuple(name for name in categories[1:] if name != "N/A")
    name = "tv:fasterrcnn_resnet50_fpn"
    network = build_model(name, 81, "coco")
    for classes in (own[::-1], ()):
        network.fit(data_of(classes))
        with refused("with 91 classes, but tv:fasterrcnn_resnet50_fpn with 81 classes is wanted"):
            checkpoint.load_weights(network, name, 81, "pretrained", False)
    network.fit(data_of(own))
    checkpoint.load_weights(network, name, 81, "pretrained", False)
    norms = [part for part in network.backbone.body.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert len(norms) == 53 and {norm.eps for norm in norms} == {0.0}
    other = build_model(name, 91, "coco")
    other.fit(data_of(tuple(map(str, range(90)))))
    with refused("the data have 90 others"):
        checkpoint.load_weights(other, name, 91, "pretrained", False)
    name = "tv:fcos_resnet18_fpn"
    with refused("write trunk"):
        checkpoint.load_weights(build_model(name, 81, "coco"), name, 81, "pretrained")


@pytest.mark.usefixtures("drawn_weights")
@pytest.mark.parametrize("kind", ["fasterrcnn", "retinanet", "fcos"])
def test_the_weights_normalise_as_torchvision_has_it(kind):
    from torchvision.models import get_model

    name = f"{kind}_resnet50_fpn"
    theirs, ours = get_model(name, weights="COCO_V1"), build_model(f"tv:{name}", 91, "coco")
    checkpoint.load_weights(ours, f"tv:{name}", 91, "pretrained")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = (network.eval().backbone(images) for network in (theirs, ours))
    assert theirs.backbone.body.bn1.eps == ours.backbone.body.bn1.eps
    for own, other in zip(found.values(), expected.values(), strict=True):
        assert (own - other).abs().max() < 1e-4 * other.abs().max()


def test_the_trunk_alone_is_no_teacher():
    teacher = ["DISTILLER.TEACHER", "tv:fasterrcnn_resnet18_fpn", "DISTILLER.TEACHER_CKPT", "trunk"]
    cfg = configured("DISTILLER.TYPE", "KD", *teacher)
    file = find_teacher(cfg, None, False, None, None)
    with refused("trunk is no whole tv:fasterrcnn_resnet18_fpn; set DISTILLER.TRAIN_TEACHER True"):
        build_distiller(cfg, scenes(), file, CPU)


@pytest.mark.parametrize(("name", "fetched"), [("fasterrcnn_resnet14", False), ("tv:fcos_resnet50_fpn", True)])
def test_a_missing_teacher_is_fetched_only_where_there_is_one(name, fetched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        find_teacher(configured("DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", name), tmp_path, False, None, None)
    text = str(caught.value.lines)
    assert ("pretrained" in text) is fetched and "download.py" not in text and "TRAIN_TEACHER True" in text


@pytest.mark.usefixtures("drawn_weights")
@pytest.mark.parametrize("file", sorted((ROOT / "configs/coco/none").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_configurations_keep_normalisations_stem_and_first_stage(file):
    cfg = load(file)
    network = build_model(cfg.DISTILLER.STUDENT, 81, "coco")
    freeze(network, cfg.SOLVER.FREEZE, cfg.DISTILLER.STUDENT)
    body = network.backbone.body
    norms = [part for part in body.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert norms and not any(p.requires_grad for norm in norms for p in norm.parameters())
    mobile = "mobilenet" in cfg.DISTILLER.STUDENT
    early = [body[name] for name in (("0", "1", "2", "3") if mobile else ("conv1", "layer1"))]
    assert not any(p.requires_grad for part in early for p in part.parameters())
    later = [p for part in body.modules() if isinstance(part, torch.nn.Conv2d) for p in part.parameters()]
    first = sum(p.numel() for part in early for p in part.parameters() if p.ndim == 4)
    assert sum(p.numel() for p in later if not p.requires_grad) == first


@pytest.mark.parametrize("name", ["fcos_resnet8", "tv:fcos_resnet18_fpn"])
def test_fcos_takes_a_levels_stride_for_its_size(name):
    network = build_model(name, 3, "coco")
    with torch.no_grad():
        maps = network.eval().backbone(torch.zeros(1, 3, 256, 256)).values()
    assert network.anchor_generator.sizes == tuple((256 // level.shape[-1],) for level in maps)
