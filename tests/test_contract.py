"""One contract over the whole registry: what every method keeps, whoever wrote it."""

import copy
import warnings

import numpy as np
import pytest
import reference
import torch

from mdistiller import config
from mdistiller.distillers import distiller_dict
from mdistiller.engine.build import prepare_parts
from mdistiller.models import cifar_model_dict

config.load()  # fills the registry
METHODS = sorted(name for name, cls in distiller_dict.items() if not cls.__module__.startswith("test"))
# Identical networks cost nothing, where the maths says so: the others have modules of their own between the two, or
# compare different things on the two sides (TTM, WTTM: another temperature; RLD: the teacher's mistakes).
ZERO = ("AT", "CTKD", "DIST", "DKD", "DTKD", "KD", "KDSVD", "MLKD", "NORMKD", "NST", "PKT", "RKD", "SP")


def model(name: str, num_classes: int = 10) -> torch.nn.Module:
    torch.manual_seed(len(name))
    return cifar_model_dict[name][0](num_classes=num_classes)


def build(method, student=None, teacher=None, opts=()):
    """In training, resnet14 -> resnet8 on ten classes unless told otherwise; CRD over 20 samples."""
    cfg = config.load(None, ["CRD.NCE.K", "6", "CRD.FEAT.DIM", "8", *opts])
    student, teacher = student or model("resnet8"), teacher or model("resnet14")
    cls = distiller_dict[method]
    if method == "NONE":
        return cls(student).train()
    extra = (20, torch.arange(20) % 10) if method == "CRD" else ()
    return cls(student, teacher, cfg, *extra).train()


def batch(size: int = 4) -> dict:
    torch.manual_seed(0)
    index = torch.arange(size)
    return {"image": torch.randn(size, 3, 32, 32), "target": index % 10, "index": index, "epoch": 3}


def test_the_registry_is_the_published_list():
    assert set(METHODS) == set(
        "NONE KD DTKD FITNET AT NST PKT KDSVD OFD RKD VID SP CRD REVIEWKD DKD "
        "CTKD MLKD DIST NORMKD TTM WTTM RLD".split()
    )


GOLDEN = reference.golden()


def golden_figures(key: str) -> list[float]:
    """Ours of [total loss, L2 norm of the student's gradients, extra parameters], by the reference's recipe."""
    _, teacher, student, method, epoch = key.split("/")
    student, teacher = (reference.fill(model(name, 100)) for name in (student, teacher))
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
    return [total.item(), norm.item(), distiller.get_extra_parameters()]


@reference.needs_reference
@pytest.mark.parametrize("key", [key for key in GOLDEN if key.startswith("distiller/")])
def test_golden_figures(key):
    np.testing.assert_allclose(golden_figures(key), GOLDEN[key], rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_building_leaves_both_models_as_they_were(method):
    student, teacher = model("MobileNetV2").train(), model("resnet8").train()
    before = [copy.deepcopy(m.state_dict()) for m in (student, teacher)]
    build(method, student, teacher)
    for m, state in zip((student, teacher), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in m.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_a_step_reaches_every_learnable_parameter_and_nothing_of_the_teacher(method):
    distiller = build(method)
    logits, losses = distiller(**batch())
    assert logits.shape == (4, 10)
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    assert set(losses) == ({"ce"} if method == "NONE" else {"loss_ce", "loss_kd"})
    sum(losses.values()).backward()
    learnable = distiller.get_learnable_parameters()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learnable)
    own = [p for name, p in distiller.named_parameters() if not name.startswith(("student.", "teacher."))]
    assert {id(p) for p in learnable} == {id(p) for p in [*distiller.student.parameters(), *own]}
    if method != "NONE":
        assert all(p.grad is None for p in distiller.teacher.parameters())
    before = [p.detach().clone() for p in learnable]
    torch.optim.SGD(learnable, lr=0.01).step()
    assert all(p.isfinite().all() for p in learnable)
    assert any(not torch.equal(a, b) for a, b in zip(before, learnable, strict=True))
    distiller.eval()
    assert torch.equal(distiller(image=batch()["image"]), distiller.student(batch()["image"])[0])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "NONE"])
def test_the_teacher_trains_in_ofd_alone(method):
    distiller = build(method)
    assert distiller.teacher.training == (method == "OFD")
    assert not distiller.eval().teacher.training


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_round_trip(method):
    first, second = build(method), build(method)
    first(**batch())
    second.load_state_dict(first.state_dict())
    for key, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[key])


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast_leaves_the_losses_in_float32(method):
    distiller = prepare_parts(build(method), torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, losses = distiller(**batch())
    assert logits.dtype == torch.float32
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in distiller.get_learnable_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_no_loss_reads_a_value_from_the_device(method):
    """A meta tensor has no values: whatever would wait for the device to learn one raises here."""
    distiller = build(method).to("meta")
    _, losses = distiller(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in batch().items()})
    sum(losses.values()).backward()


@pytest.mark.parametrize("method", ZERO)
def test_identical_networks_cost_nothing(method):
    teacher = model("resnet8")
    distiller = build(method, copy.deepcopy(teacher), teacher)
    distiller.student.eval()
    assert distiller(**batch())[1]["loss_kd"].abs() < 1e-4


def give(distiller, method, image):
    """What the contract leaves to chance, fixed: CRD's negatives, MLKD's strong view."""
    if method == "CRD":
        return {"contrastive_index": torch.stack([torch.arange(4), torch.arange(4) + 10, torch.arange(4) + 15], 1)}
    return {"image_strong": image.flip(3)} if method == "MLKD" else {}


@pytest.mark.parametrize("method", METHODS)
def test_the_batchs_order_does_not_matter(method):
    order, data, totals = torch.tensor([2, 0, 3, 1]), batch(), []
    for permutation in (torch.arange(4), order):
        precision = torch.float32 if method == "CRD" else torch.float64  # CRD embeds in float32 whatever arrives
        distiller, image = build(method).to(precision), data["image"].to(precision)
        given = {key: value[permutation] for key, value in give(distiller, method, image).items()}
        moved = {key: data[key][permutation] for key in ("target", "index")}
        torch.manual_seed(0)
        _, losses = distiller(image=image[permutation], epoch=3, **moved, **given)
        totals.append(sum(losses.values()))
    torch.testing.assert_close(*totals, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_warns_of_nothing(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(method)(**batch())
