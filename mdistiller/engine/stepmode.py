"""How a step runs: eagerly, as a CUDA graph, or compiled; as SOLVER.STEP says, or as pays on the device."""

import os
import shutil
import sys
from collections.abc import Callable

import torch
from torch import nn
from yacs.config import CfgNode

from mdistiller.distillers import LogitDistiller, Vanilla
from mdistiller.errors import UserError

COMPILING = 20_000  # steps: those that compiling saves the time of, three times over (docs/performance.md)


def uses_graph(cfg: CfgNode, device: torch.device) -> bool:
    """fp16's gradient scaler looks at every step, which a graph cannot."""
    return device.type == "cuda" and cfg.SOLVER.STEP != "eager" and cfg.SOLVER.AMP != "fp16"


def compiled_form(cfg: CfgNode, distiller: nn.Module, device: torch.device, steps: int) -> tuple[Callable | None, str]:
    """What is to be called in place of `distiller`, compiled at its first call for each batch size; None where it is
    not to be, and why, where SOLVER.STEP asks for it.

    auto compiles on a CPU what needs no features, whose storing costs as much as compiling gains, for so many `steps`
    that faster ones make up for the compiling; not a student that says `compiles_well = False`.
    """
    own = [
        f"{path}.{name}".lstrip(".")
        for path, module in distiller.named_modules()
        if path.split(".")[0] not in ("student", "teacher") and not isinstance(module, nn.BatchNorm2d)
        for name, _ in module.named_buffers(recurse=False)
    ]
    if cfg.SOLVER.STEP == "auto":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # what torch takes
        pays = device.type == "cpu" and steps >= COMPILING and isinstance(distiller, (LogitDistiller, Vanilla))
        pays = pays and getattr(distiller.student, "compiles_well", True)
        if own or not pays or shutil.which(compiler) is None:
            return None, ""
    elif cfg.SOLVER.STEP != "compile":
        return None, ""
    if own:  # torch computes parts of the forward pass anew for the backward one, from what it has left by then
        return None, f"{cfg.DISTILLER.TYPE} writes to '{own[0]}', which a compiled backward pass would read too late"
    # drawing what an eager step draws
    return torch.compile(distiller, dynamic=False, options={"fallback_random": True}), ""


def check_step(cfg: CfgNode, device: torch.device) -> None:
    """Raises UserError where the device cannot run steps as SOLVER.STEP says."""
    if cfg.SOLVER.STEP == "graph" and device.type != "cuda":
        raise UserError(f"SOLVER.STEP: graph needs CUDA, and the device is {device.type}; set SOLVER.STEP auto")
    if cfg.SOLVER.STEP == "graph" and cfg.SOLVER.AMP == "fp16":
        raise UserError("SOLVER.STEP: fp16's scaler looks at every step, which a graph cannot; set SOLVER.AMP bf16")
