"""The step once more whose loss was not finite, from the file that the stopped run kept."""

import tempfile
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from mdistiller.dataset import Batch, DetectionBatch, TwoViews, load_dataset
from mdistiller.device import resolve_device, set_torch_generators
from mdistiller.engine.cfg import load
from mdistiller.engine.diagnose import describe_losses, first_bad_tensor
from mdistiller.engine.method import build_distiller
from mdistiller.errors import UserError
from mdistiller.runs import checkpoint


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
