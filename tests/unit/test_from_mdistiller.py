"""What code written for mdistiller imports is here, and its value is that of our own functions."""

import math
import re

import pytest
import torch
from helpers import ROOT, refused, save_teacher
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import mdistiller.losses as losses
from mdistiller import config, dataset
from mdistiller.dataset import Batches, ImageSet, cifar100, get_dataset
from mdistiller.distillers import distiller_dict
from mdistiller.distillers._upstream import NAMES
from mdistiller.engine import utils
from mdistiller.engine.dot import DistillationOrientedTrainer
from mdistiller.engine.solver import DOT, set_lr
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict, imagenet_model_dict, tiny_imagenet_model_dict
from mdistiller.models._paths import PATHS

NETWORKS = [*cifar_model_dict, *(f"imagenet/{name}" for name in imagenet_model_dict)]


@pytest.fixture
def data(monkeypatch):
    """40 + 20 random images of 10 classes, as DATASET.TYPE cifar100."""
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator) for n in (40, 20))
    images = ImageSet(train, torch.arange(40) % 10, test, torch.arange(20) % 10, 10, (0.5,) * 3, (0.25,) * 3)
    monkeypatch.setitem(dataset.dataset_dict.data, "cifar100", lambda root: images)
    return images


def configuration(**changes):
    cfg = config.load(None, ["SOLVER.BATCH_SIZE", 16, "DATASET.TEST.BATCH_SIZE", 8, "CRD.NCE.K", 50])
    cfg.defrost()
    cfg.merge_from_list([word for pair in changes.items() for word in (pair[0].replace("__", "."), pair[1])])
    return cfg


def test_get_dataset_has_no_two_views(data):
    with pytest.raises(UserError, match="trains on two; train with tools/train.py"):
        get_dataset(configuration(SOLVER__TRAINER="ours"))


@pytest.mark.parametrize("name", ["scenes", "python"])
def test_get_dataset_has_images_of_one_class_each(name):
    with refused(f"the data set {name} is for .* score a run on it with tools/eval.py"):
        get_dataset(configuration(DATASET__TYPE=name))


def test_get_dataset_gives_the_batches_of_a_run(data):
    train, test, samples, classes = get_dataset(configuration(SEED=3))
    assert (samples, classes, len(train), len(test)) == (40, 10, 3, 3)
    assert isinstance(train, DataLoader) and (train.batch_size, test.batch_size) == (16, 8)
    ours = Batches(data.train_images, data.train_labels, data.mean, data.std, 16, "crop_flip", 3)
    for epoch in (1, 2):
        for got, batch in zip(train, ours.epoch(epoch), strict=True):
            assert all(map(torch.equal, got, batch)) and got[0].is_contiguous()
    train.set_epoch(2)
    assert torch.equal(next(iter(train))[2], next(ours.epoch(2)).index)
    ours = Batches(data.test_images, data.test_labels, data.mean, data.std, 8)
    for (image, target), batch in zip(test, ours, strict=True):
        assert torch.equal(image, batch.image) and torch.equal(target, batch.target)


def test_items_of_a_split(data):
    train, test, _, _ = get_dataset(configuration())
    image, target = test.dataset[-1]
    assert len(test.dataset) == 20 and torch.equal(image, list(test)[-1][0][-1]) and target == 9
    seen = {train.dataset[7][0].numpy().tobytes() for _ in range(8)}
    assert len(seen) > 1, "crops and flips differ"
    assert [int(v) for v in train.dataset[7][1:]] == [7, 7]
    assert (train.dataset.data == data.train_images.numpy()).all() and train.dataset.targets[:3] == [0, 1, 2]
    assert sum(1 for _ in test.dataset) == 20


@pytest.mark.parametrize(
    "changes",
    [{"DISTILLER__TYPE": "CRD"}, {"SOLVER__TRAINER": "crd"}, {"DISTILLER__TYPE": "CRD", "CRD__MODE": "relax"}],
)
def test_tuples_for_contrast(data, changes):
    loader = get_dataset(configuration(**changes))[0]
    batches = list(loader)
    for _, target, index, contrastive in batches:
        assert contrastive.shape == (len(index), 51) and torch.equal(contrastive[:, 0], index)
        others = data.train_labels[contrastive[:, 1:]] != target[:, None]
        if changes.get("CRD__MODE") == "relax":
            assert (contrastive[:, 1:] != index[:, None]).all() and not others.all()
        else:
            assert others.all()
    drawn = torch.cat([batch[3][:, 1:] for batch in batches]).flatten()
    assert set(drawn.tolist()) == set(range(40))
    loader.set_epoch(1)
    assert torch.equal(next(iter(loader))[3], batches[0][3]), "seeded"
    assert loader.dataset[5][3].shape == (51,) and loader.dataset[5][3][0] == 5


def test_cifar100_dataloaders(data, monkeypatch):
    monkeypatch.setattr(cifar100, "cifar100", lambda root: data)
    train, test, samples = cifar100.get_cifar100_dataloaders(16, 8, 4)
    assert (samples, len(train), len(test), len(next(iter(train)))) == (40, 3, 3, 3)
    train, _, _ = cifar100.get_cifar100_dataloaders_sample(16, 8, 4, k=5, mode="exact")
    assert next(iter(train))[3].shape == (16, 6)
    assert cifar100.get_data_folder() == config.CFG.DATASET.ROOT


def test_meter_and_accuracy():
    meter = utils.AverageMeter()
    meter.update(1.0, 3)
    meter.update(5.0)
    assert (meter.val, meter.avg, meter.sum, meter.count) == (5.0, 2.0, 8.0, 4)
    logits, target = torch.eye(6)[[0, 1, 2, 3]] + torch.arange(6) / 100, torch.tensor([0, 5, 2, 0])
    top1, top2, top5 = utils.accuracy(logits, target, topk=(1, 2, 5))
    assert [value.shape for value in (top1, top2, top5)] == [(1,)] * 3
    assert (top1[0], top2[0], top5[0]) == (50, 75, 75)


def test_validate_is_the_evaluation_of_a_run(data):
    network = cifar_model_dict["resnet8"][0](num_classes=10)
    distiller = distiller_dict["NONE"](network)
    top1, top5, loss = utils.validate(get_dataset(configuration())[1], nn.DataParallel(distiller))
    images = Batches(data.test_images, data.test_labels, data.mean, data.std, 20)
    with torch.no_grad():
        logits = network.eval()(next(iter(images)).image)[0]
    expected = [value.item() for value in utils.accuracy(logits, data.test_labels, (1, 5))]
    assert [top1, top5] == pytest.approx(expected)
    assert loss == pytest.approx(F.cross_entropy(logits, data.test_labels).item(), rel=1e-5)


def test_learning_rate_falls_as_in_a_run():
    cfg, optimizer = configuration(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    rates = [utils.adjust_learning_rate(epoch, cfg, optimizer) for epoch in (1, 150, 151, 181, 211)]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 5e-4, 5e-5])
    assert optimizer.param_groups[0]["lr"] == rates[-1]


def test_checkpoints_and_messages(tmp_path):
    file = save_teacher(tmp_path / "teacher")
    state = utils.load_checkpoint(file)["model"]
    utils.save_checkpoint({"model": state, "epoch": 3}, tmp_path / "copy")
    copy = utils.load_checkpoint(str(tmp_path / "copy"))
    assert copy["epoch"] == 3 and all(torch.equal(copy["model"][key], value) for key, value in state.items())
    utils.save_checkpoint(state, tmp_path / "bare")
    cifar_model_dict["resnet8"][0](num_classes=10).load_state_dict(torch.load(tmp_path / "bare"))
    with pytest.raises(UserError):
        utils.load_checkpoint(tmp_path / "missing")
    assert "[EVAL] top-1 70" in utils.log_msg("top-1 70", "EVAL") and "[INFO]" in utils.log_msg("x")


def test_dot_in_two_calls_is_dot_in_one():
    torch.manual_seed(0)
    batch = torch.randn(5, 4)
    nets = [nn.Linear(4, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    two = DistillationOrientedTrainer(nets[0].parameters(), 0.1, momentum=0.825, momentum_kd=0.975, weight_decay=5e-4)
    one = DOT(nets[1].parameters(), 0.9, 5e-4, 0.075)
    set_lr(one, 0.1)
    for _ in range(3):
        task, kd = nets[0](batch).square().mean(), nets[0](batch).abs().mean()
        two.zero_grad(set_to_none=True)
        kd.backward(retain_graph=True)
        two.step_kd()
        two.zero_grad(set_to_none=True)
        task.backward()
        two.step()
        task, kd = nets[1](batch).square().mean(), nets[1](batch).abs().mean()
        one.zero_grad()
        gradients = torch.autograd.grad(kd, list(nets[1].parameters()), retain_graph=True)
        (task + kd).backward()
        one.step(gradients)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_masks_and_z_scores():
    from mdistiller.distillers._common import _get_gt_mask as again
    from mdistiller.distillers.DKD import _get_gt_mask, _get_other_mask, cat_mask, normalize

    torch.manual_seed(0)
    v, u, target = torch.randn(6, 7), torch.randn(6, 7), torch.randint(7, (6,))
    gt, other = _get_gt_mask(v, target), _get_other_mask(v, target)
    assert again is _get_gt_mask and torch.equal(gt, F.one_hot(target, 7).bool()) and torch.equal(other, ~gt)
    p, q = (cat_mask((z / 4).softmax(1), gt, other) for z in (v, u))
    tckd = F.kl_div(p.log(), q, reduction="batchmean") * 16
    torch.testing.assert_close(tckd, losses.dkd_loss(v, u, target, 1.0, 0.0, 4.0))
    nckd = F.kl_div(
        (v / 4).masked_fill(gt, -1000).log_softmax(1), (u / 4).masked_fill(gt, -1000).log_softmax(1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    torch.testing.assert_close(16 * nckd, losses.dkd_loss(v, u, target, 0.0, 1.0, 4.0))
    # over K - 1, where the rule std is over K: as at another temperature
    tau = 4 * math.sqrt(7 / 6)
    z_scores = losses.kd_loss(normalize(v), normalize(u), 4.0) / 16
    torch.testing.assert_close(z_scores, losses.kd_loss(v, u, tau, logit_stand=True) / tau**2)
    stand = losses.dkd_loss(v, u, target, 1.0, 8.0, 2.0, logit_stand=True)
    z = [(x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True) for x in (v, u)]
    torch.testing.assert_close(stand, losses.dkd_loss(*z, target, 1.0, 8.0, 2.0))


def test_losses_of_one_stage():
    from mdistiller.distillers.AT import at_loss, single_stage_at_loss
    from mdistiller.distillers.NST import nst_loss, single_stage_nst_loss
    from mdistiller.distillers.OFD import feat_loss
    from mdistiller.distillers.RKD import _pdist
    from mdistiller.distillers.SP import similarity_loss, sp_loss

    torch.manual_seed(0)
    maps_s, maps_t = ([torch.randn(4, 6, size, size) for size in (8, 4)] for _ in range(2))
    pairs = list(zip(maps_s, maps_t, strict=True))
    torch.testing.assert_close(sum(single_stage_at_loss(s, t, 2) for s, t in pairs), at_loss(maps_s, maps_t, 2))
    torch.testing.assert_close(sum(single_stage_nst_loss(s, t) for s, t in pairs), nst_loss(maps_s, maps_t))
    torch.testing.assert_close(sum(similarity_loss(s, t) for s, t in pairs), sp_loss(maps_s, maps_t))
    margin = -torch.rand(1, 6, 1, 1)
    assert feat_loss(*pairs[0], margin) == losses.ofd_loss(*pairs[0], margin)
    points = torch.randn(5, 3)
    torch.testing.assert_close(_pdist(points, False, 1e-12), torch.cdist(points, points), atol=1e-5, rtol=1e-4)


def test_memory_and_loss_of_crd_are_those_of_the_method():
    """Two steps: the second sees the updated memories and the constants of the first."""
    from mdistiller.distillers.CRD import ContrastLoss, ContrastMemory

    torch.manual_seed(0)
    cfg = config.CFG.clone()
    cfg.CRD.NCE.K, cfg.CRD.FEAT.DIM = 7, 8
    network = cifar_model_dict["resnet8"][0](num_classes=10)
    method = distiller_dict["CRD"](network, network, cfg, 40, torch.arange(40) % 10)
    memory, criterion = ContrastMemory(8, 40, 7, 0.07, 0.5), ContrastLoss(40)
    memory.load_state_dict(method.state_dict(), strict=False)
    for step in range(2):
        feats_s, feats_t = ({"pooled_feat": torch.randn(5, 64)} for _ in range(2))
        index = torch.arange(5) + step
        picked = torch.cat([index[:, None], torch.randint(40, (5, 7))], 1)
        given = (method.embed_s(feats_s["pooled_feat"]), method.embed_t(feats_t["pooled_feat"]))
        expected = method.feature_loss(feats_s, feats_t, target=index % 10, index=index, contrastive_index=picked)
        out_s, out_t = memory(*given, index, picked)
        assert out_s.shape == (5, 8, 1)
        torch.testing.assert_close(criterion(out_s) + criterion(out_t), expected)
        assert torch.equal(memory.memory_v1, method.memory_v1) and torch.equal(memory.params, method.params)
    out_s, _ = memory(*given, index)
    assert out_s.shape == (5, 8, 1) and out_s.isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_what_public_code_reads(name):
    constructor = imagenet_model_dict[name[9:]] if "/" in name else cifar_model_dict[name][0]
    with torch.device("meta"):
        network = constructor(num_classes=7)
    before, parts = list(network.state_dict()), network.get_feat_modules()
    assert isinstance(network.relu, nn.ReLU) and isinstance(network.avgpool, nn.Module)
    assert network.avgpool(torch.ones(2, 5, 4, 4)).shape == (2, 5, 1, 1)
    assert isinstance(parts, nn.ModuleList) and parts[0] is next(network.children())
    own = [child for child in network.children() if child in list(parts)]
    assert own == list(parts), "in their order"
    assert not any(isinstance(module, nn.Linear) for module in parts.modules())
    whole, held = ({*map(id, part.parameters())} for part in (network, parts))
    classifier = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    assert whole - held == {*map(id, classifier.parameters())}
    assert list(network.state_dict()) == before and "relu" not in dict(network.named_children())


def test_a_subclass_keeps_submodules_of_its_own():
    from mdistiller.models.resnet import ResNet

    class Mine(ResNet):
        def __init__(self):
            super().__init__(8)
            self.avgpool = nn.AvgPool2d(2)

    assert Mine().avgpool.kernel_size == 2


def test_paths_of_models():
    import mdistiller.models.cifar.resnet as resnet
    from mdistiller.models.cifar import ShuffleNetv1, ShuffleNetv2, mobilenetv2, resnetv2, vgg, wrn
    from mdistiller.models.imagenet.mobilenetv1 import MobileNetV1
    from mdistiller.models.imagenet.resnet import resnet18

    from mdistiller.models import cifar, imagenet

    found = {name for module in (resnet, resnetv2, ShuffleNetv1, ShuffleNetv2, wrn) for name in vars(module)}
    assert found >= {name for name in cifar_model_dict.active if name != "MobileNetV2" and not name.startswith("vgg")}
    assert resnet.resnet8x4 is cifar_model_dict["resnet8x4"][0]
    assert vgg.vgg13_bn is cifar_model_dict["vgg13"][0] and not hasattr(vgg, "vgg13")
    assert mobilenetv2.mobile_half is cifar_model_dict["MobileNetV2"][0]
    assert resnet18 is imagenet_model_dict["ResNet18"] and MobileNetV1 is imagenet_model_dict["MobileNetV1"]
    assert cifar.cifar_model_dict is cifar_model_dict and imagenet.imagenet_model_dict is imagenet_model_dict
    assert cifar.tiny_imagenet_model_dict is tiny_imagenet_model_dict


def test_dictionaries_of_models():
    constructor, path = tiny_imagenet_model_dict["ResNet18"]
    with torch.device("meta"):
        assert constructor(num_classes=200)(torch.zeros(1, 3, 64, 64))[0].shape == (1, 200)
        assert imagenet_model_dict["ResNet18"](pretrained=False).fc.out_features == 1000
    assert path == "download_ckpts/tiny_imagenet_teachers/ResNet18_vanilla/ckpt_epoch_240.pth"
    with pytest.raises(UserError, match="no weights of a library for MobileNetV1"):
        imagenet_model_dict["MobileNetV1"](pretrained=True)


def test_the_page_lists_what_there_is():
    """Each of its lines runs, and it names every name that stands here for mdistiller's code alone."""
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "from_mdistiller.md").read_text(), re.S)
    for line in text.splitlines():
        exec(line, {})
    listed = {
        (module, name) for module, names in re.findall(r"from (\S+) import (.*)", text) for name in names.split(", ")
    }
    ours = {(f"mdistiller.distillers.{module}", item.__name__) for module, items in NAMES.items() for item in items}
    assert ours <= listed
    assert {f"mdistiller.models.{path}" for path in PATHS} <= {module for module, _ in listed}
    own = {name for name, item in vars(utils).items() if getattr(item, "__module__", "") == utils.__name__}
    assert {("mdistiller.engine.utils", name) for name in own} <= listed
