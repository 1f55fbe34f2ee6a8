"""Where a loss stops being finite: the step once more, in the run that it stops or from the file that this keeps."""

import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mdistiller.dataset import Batch, DetectionBatch, TwoViews, load_dataset
from mdistiller.device import autocast, resolve_device, set_torch_generators
from mdistiller.engine.cfg import load
from mdistiller.engine.method import build_distiller
from mdistiller.engine.shard import whole
from mdistiller.errors import UserError
from mdistiller.runs import checkpoint


def first_bad_tensor(
    distiller: nn.Module, batch: Batch, epoch: int, amp: str, logits_teacher: Tensor | None = None
) -> tuple[str, dict[str, float]]:
    """Run a step's forward and backward pass, in training mode, without an update. Returns what went bad first, in
    words (empty: nothing did), and the loss terms. The order is that in which a step meets them: images, parameters,
    the teacher's given logits, every module's output, the loss terms, the gradients from the loss back. Parameters
    stay as they are; buffers see the batch once more, and are not looked at: what the step has done to them would
    come before its cause.
    """
    found: list[str] = []

    def look(name: str, *values: object) -> None:
        tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        if not found and not all(bool(value.isfinite().all()) for value in tensors):
            found.append(name)

    def hook(name: str):
        def seen(_module: nn.Module, _inputs: object, output: object) -> None:
            look(f"the output of {name}", *(output if isinstance(output, (tuple, list)) else (output,)))

        return seen

    distiller.observer = None  # the temperature record's
    look("the images", *(batch.image if isinstance(batch.image, list) else batch))
    for name, value in distiller.named_parameters():
        look(f"'{name}'", value)
    given = {} if logits_teacher is None else {"logits_teacher": logits_teacher}
    look("the teacher's logits", *given.values())
    handles = [module.register_forward_hook(hook(name)) for name, module in distiller.named_modules() if name]
    try:
        distiller.zero_grad(set_to_none=True)
        with autocast(next(distiller.parameters()).device, amp):
            _, terms = distiller(**batch._asdict(), epoch=epoch, **given)
            losses = {name: value.float().mean() for name, value in terms.items()}
        for name, value in losses.items():
            look(f"the loss term {name}", value)
        sum(losses.values()).backward()
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in reversed(list(distiller.named_parameters())):
        if parameter.grad is not None:
            look(f"the gradient of '{name}'", parameter.grad)
    distiller.zero_grad(set_to_none=True)
    values = {name: float(value.detach()) for name, value in losses.items()}
    return (found or [""])[0], values


def describe_losses(losses: dict[str, float]) -> str:
    """Return the losses as text: loss_ce 2.31, loss_kd NaN."""
    names = {True: "NaN", False: "infinite"}
    return ", ".join(
        f"{name} {value:.4g}" if math.isfinite(value) else f"{name} {names[math.isnan(value)]}"
        for name, value in losses.items()
    )


def dump(
    distiller: nn.Module,
    batch: Batch,
    epoch: int,
    config: str,
    random: tuple[Tensor, Tensor | None],
    logits_teacher: Tensor | None = None,
) -> dict:
    """Return what `replay` needs: configuration, weights, batch, and torch's generators as before the step."""
    return {
        "config": config,
        "model": {name: whole(value) for name, value in distiller.state_dict().items()},
        "batch": batch._asdict(),
        "epoch": epoch,
        "rng": random[0],
        "rng_cuda": random[1],
        "logits_teacher": logits_teacher,
    }


def replay(file: Path) -> tuple[str, str]:
    """Run the step kept in `file` again. Return what goes bad first, empty if nothing does, and its losses as text.

    Raises UserError where `file` is no such file.
    """
    kept = checkpoint.load(file)
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as text:
            text.write(kept["config"])
            text.flush()
            cfg = load(text.name)  # plug-ins and all
        parts, epoch, model, rng = kept["batch"], kept["epoch"], kept["model"], kept["rng"]
        batch = next(kind for kind in (Batch, TwoViews, DetectionBatch) if {*kind._fields} == {*parts})(**parts)
        logits = kept.get("logits_teacher")
        device = resolve_device(cfg.DEVICE)
        data = load_dataset(cfg.DATASET.TYPE, cfg.DATASET.ROOT, cfg.DATASET)
        distiller = build_distiller(cfg, data, None, device)
        distiller.load_state_dict(model)
    except (KeyError, TypeError, RuntimeError, AttributeError, StopIteration) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: is no batch that a stopped run has kept ({reason})") from None
    set_torch_generators(rng, kept.get("rng_cuda"))
    batch = tree_map_only(torch.Tensor, lambda value: value.to(device), batch)
    logits = None if logits is None else logits.to(device)
    bad, losses = first_bad_tensor(distiller.train(), batch, epoch, cfg.SOLVER.AMP, logits)
    return bad, describe_losses(losses)
