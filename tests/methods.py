"""Methods, batches and logits that tests of methods use."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from mdistiller import config
from mdistiller.distillers import distiller_dict
from mdistiller.models import cifar_model_dict


def model(name: str = "resnet8", num_classes: int = 10) -> nn.Module:
    """The same weights at each call."""
    torch.manual_seed(len(name))
    return cifar_model_dict[name][0](num_classes=num_classes)


def build(method: str, student: nn.Module | None = None, teacher: nn.Module | None = None, *opts: str) -> nn.Module:
    """In training, resnet14 -> resnet8 on ten classes unless told otherwise; CRD over 20 samples."""
    cfg = config.load(None, ["CRD.NCE.K", "6", "CRD.FEAT.DIM", "8", *opts])
    extra = {"num_data": 20, "labels": torch.arange(20) % 10}
    cls = distiller_dict[method]
    parts = student or model("resnet8"), teacher or model("resnet14") if cls.needs_teacher else None
    return cls(*parts, cfg, **{name: extra[name] for name in cls.needs}).train()


def batch(size: int = 4) -> dict:
    """What a method is trained on: random images of the classes in turn."""
    torch.manual_seed(0)
    index = torch.arange(size)
    return {"image": torch.randn(size, 3, 32, 32), "target": index % 10, "index": index, "epoch": 3}


def logits(seed: int = 0, batch: int = 6, classes: int = 5, scale: float = 4.0, dtype=torch.float64) -> torch.Tensor:
    """Random logits (B, K), each row's maximum positive, so that max_logit is defined."""
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(batch, classes, generator=generator, dtype=dtype)
    values[:, 0] = values[:, 0].abs() + 0.5
    return values


def sides() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield each of `corners`, either side as the student's: its name and two leaves."""
    for corner, pair in corners().items():
        for step in (1, -1):
            yield corner, *(side.clone().requires_grad_() for side in pair[::step])


def corners() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Finite logits (B, K) of student and teacher where an exponential, a quotient or a root may go wrong."""
    v, u = logits(0, dtype=torch.float32), logits(1, dtype=torch.float32)
    big, ramp = torch.finfo(torch.float32).max, torch.arange(5.0).expand(2, 5)
    two = torch.tensor([[3.0, -1.0], [-2.0, -1.0]])
    return {
        "huge teacher": (v, 1e4 * u),
        "gigantic teacher": (v, 1e30 * u),
        "gigantic both": (1e30 * v, 1e30 * u),
        "largest floats": (torch.where(v > 0, big, -big), torch.where(u > 0, big, -big)),
        "opposite ends": (1e-9 * v, 1e30 * u),
        "far apart": (torch.tensor([[1e-3, -1e3]]), torch.tensor([[1e3, 1e-3]])),
        "opposite": (ramp, -ramp),
        "nearly opposite": (ramp, -ramp * (1 + 1e-7)),
        "one hot teacher": (v, F.one_hot(u.argmax(1), 5) * 1e6),
        "zero student": (torch.zeros_like(v), u),
        "zero both": (torch.zeros_like(v), torch.zeros_like(u)),
        "a zero row": (v * torch.tensor([1.0, 0, 1, 1, 1, 1])[:, None], u),
        "a constant row": (torch.where(torch.arange(6)[:, None] == 1, 2.5, v), u),
        "far constant": (torch.full_like(v, -1e30), u),
        "negative maxima": (v - 100, u - 200),
        "cancelling maxima": (v - v.amax(1, keepdim=True) + 3, u - u.amax(1, keepdim=True) - 3),
        "tiny student": (1e-30 * v, u),
        "denormal student": (torch.full_like(v, 1e-45), u),
        "small maximum, deep rest": (torch.where(v > 3, 1e-9, -1e20), u),
        "small spread": (1e-5 * v, u),
        "ties": (torch.ones_like(v), torch.ones_like(u)),
        "two classes": (two, -two),
        "one sample": (v[:1], u[:1]),
        "bf16": (v.bfloat16(), (1e3 * u).bfloat16()),
        "fp16": (v.half(), u.half()),
    }
