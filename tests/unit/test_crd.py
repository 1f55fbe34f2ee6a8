"""CRD: where negatives come from, what the memory keeps, the estimate itself."""

import math

import pytest
import torch
from methods import batch, build, model

from mdistiller import config
from mdistiller.dataset import ImageSet
from mdistiller.distillers.CRD import CRD, Negatives, nce_loss, similarities
from mdistiller.engine.method import build_distiller
from mdistiller.errors import UserError


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_negatives_are_uniform_over_the_other_classes_or_samples(mode):
    labels = torch.tensor([2, 0, 1, 0, 2, 2, 0, 1, 0, 0])
    torch.manual_seed(0)
    index = torch.arange(10)
    drawn = Negatives(10, labels if mode == "exact" else None)(index, labels[index], 2000)
    for i in range(10):
        count = torch.bincount(drawn[i], minlength=10).double()
        allowed = labels != labels[i] if mode == "exact" else index != i
        assert (count[~allowed] == 0).all()
        want = drawn.shape[1] / allowed.sum()
        assert ((count[allowed] - want).abs() < 5 * math.sqrt(want)).all()


def test_crd_without_labels_says_so_and_draws():
    distiller = CRD(model("resnet8"), model("resnet14"), config.load(None, ["CRD.NCE.K", "6"]), 20).train()
    with pytest.warns(UserWarning, match="relax"):
        distiller(**batch())


def test_crd_memory_and_constants_move_once_and_only_where_seen():
    distiller = build("CRD")
    assert (distiller.params[2:4] == -1).all()
    before = distiller.memory_v1.clone()
    distiller(**batch())
    constants = distiller.params.clone()
    assert (constants > 0).all()
    assert torch.equal(before[4:], distiller.memory_v1[4:])
    torch.testing.assert_close(distiller.memory_v1[:4].norm(dim=1), torch.ones(4))
    distiller(**batch())
    assert torch.equal(distiller.params, constants)
    assert {"memory_v1", "memory_v2", "params"} <= set(distiller.state_dict())


def test_crd_scores_are_those_of_the_gathered_rows():
    torch.manual_seed(0)
    anchor, memory, index = torch.randn(3, 8), torch.randn(20, 8), torch.randint(20, (3, 5))
    want = torch.einsum("bkd,bd->bk", memory[index], anchor) / 0.07
    torch.testing.assert_close(similarities(anchor, memory, index, 0.07), want)


def test_nce_against_its_definition():
    torch.manual_seed(0)
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    z, n = torch.tensor(40.0, dtype=torch.float64), 20
    p, noise = scores.exp() / z, 5 / n
    want = -(p[:, 0] / (p[:, 0] + noise)).log() - (noise / (p[:, 1:] + noise)).log().sum(1)
    torch.testing.assert_close(nce_loss(scores, z, n), want.mean(), rtol=1e-5, atol=0)
    assert torch.autograd.gradcheck(lambda s: nce_loss(s, z, n), scores)


def test_the_builder_gives_crd_the_labels(tmp_path):
    images, labels = torch.zeros(20, 32, 32, 3, dtype=torch.uint8), torch.arange(20) % 10
    data = ImageSet(images, labels, images, labels, 10, (0.5,) * 3, (0.25,) * 3)
    torch.save({"model": model("resnet8").state_dict()}, tmp_path / "teacher")
    cfg = config.load(None, ["DISTILLER.TYPE", "CRD", "DISTILLER.TEACHER", "resnet8", "DISTILLER.STUDENT", "resnet8"])
    distiller = build_distiller(cfg, data, tmp_path / "teacher", torch.device("cpu"))
    assert distiller.negatives.by_class
    assert len(distiller.memory_v1) == 20


def test_one_class_leaves_nothing_to_contrast():
    with pytest.raises(UserError, match="nothing to contrast"):
        CRD(model("resnet8"), model("resnet8"), config.load(), 5, torch.zeros(5, dtype=torch.int64))
