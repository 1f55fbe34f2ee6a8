"""How a step runs: eagerly, as a CUDA graph, or compiled; as SOLVER.STEP says, or as pays on the device."""

import functools
import os
import shutil
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from mdistiller.bank.streamed import StreamedLogits
from mdistiller.dataset import Batch, Batches
from mdistiller.distillers import LogitDistiller, Vanilla
from mdistiller.engine.graph import GraphStep
from mdistiller.engine.step import Step
from mdistiller.errors import UserError
from mdistiller.models.libraries import LibraryNetwork
from mdistiller.models.vgg import VGG

COMPILE_FROM_STEPS = 20_000  # in which compiled steps save three times what compiling costs (docs/performance.md)


def uses_graph(cfg: CfgNode, device: torch.device, capturable: bool = True) -> bool:
    """Return whether steps run as CUDA graphs. (fp16's gradient scaler looks at every step, which a graph cannot.) auto
    makes none of a method that is not known to be `capturable`.
    """
    wanted = cfg.SOLVER.STEP != "eager" and (capturable or cfg.SOLVER.STEP != "auto")
    return device.type == "cuda" and wanted and cfg.SOLVER.AMP != "fp16"


def compiled_form(
    cfg: CfgNode, distiller: nn.Module, device: torch.device, steps: int, exchanges: bool = False
) -> tuple[Callable | None, str]:
    """Return what is to be called in place of `distiller`, compiled at its first call for each batch size; or None, and
    the reason where SOLVER.STEP asks for it.

    auto compiles on a CPU what needs no features, whose storing costs as much as compiling gains, for so many `steps`
    that faster ones make up for the compiling; not VGG, whose max-pooling's compiled backward pass costs more than all
    the rest gains; not a library's network, whose compiling may take longer than any zoo's. `exchanges`: a pass takes
    part in what several processes exchange, which stays as it is.
    """
    own = [
        f"{path}.{name}".lstrip(".")
        for path, module in distiller.named_modules()
        if path.split(".")[0] not in ("student", "teacher") and not isinstance(module, nn.BatchNorm2d)
        for name, _ in module.named_buffers(recurse=False)
    ]
    if cfg.SOLVER.STEP == "auto":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # what torch takes
        pays = device.type == "cpu" and steps >= COMPILE_FROM_STEPS and isinstance(distiller, (LogitDistiller, Vanilla))
        pays = pays and not isinstance(distiller.student, (VGG, LibraryNetwork))
        if own or exchanges or not pays or shutil.which(compiler) is None:
            return None, ""
    elif cfg.SOLVER.STEP != "compile":
        return None, ""
    if exchanges:
        return None, f"{cfg.DISTILLER.TYPE} exchanges numbers with other processes on its way"
    if own:  # torch computes parts of the forward pass anew for the backward one, from what it has left by then
        return None, f"{cfg.DISTILLER.TYPE} writes to '{own[0]}', which a compiled backward pass would read too late"

    @functools.cache  # at the first call: the compiler takes seconds to import, and a run's first steps go before it
    def compiled() -> Callable:  # fallback_random: the same random numbers as an eager step
        return torch.compile(distiller, dynamic=False, options={"fallback_random": True})

    return (lambda **given: compiled()(**given)), ""


def check_step(cfg: CfgNode, device: torch.device) -> None:
    """Raise UserError where the device cannot run steps as SOLVER.STEP says."""
    if cfg.SOLVER.STEP == "graph" and device.type != "cuda":
        raise UserError(f"SOLVER.STEP: graph needs CUDA, and the device is {device.type}; set SOLVER.STEP auto")
    if cfg.SOLVER.STEP == "graph" and cfg.SOLVER.AMP == "fp16":
        raise UserError("SOLVER.STEP: fp16's scaler looks at every step, which a graph cannot; set SOLVER.AMP bf16")


class RunStep:
    """Runs the training step of a plan: cuts the batch out of the images and trains on it.

    `graph`: as a CUDA graph, where the step can be one; `exclusive`: whether no other graph runs at the same time.
    `teacher`: gives the logits of the batch, where they are not computed ahead.
    """

    def __init__(
        self,
        step: Step,
        batches: Batches,
        graph: bool = False,
        exclusive: bool = True,
        teacher: StreamedLogits | None = None,
    ):
        self.step, self.batches, self.teacher = step, batches, teacher
        self.graph = GraphStep(self._run, step.distiller, step.device, exclusive) if graph else None
        self.batch: Batch | None = None  # of the latest step, with its logits; a graph's own tensors are no batch
        self.logits: Tensor | None = None

    def __call__(self, plan: Tensor, logits: Tensor | None, epoch: int) -> list[str]:
        """Train on `plan` (4, B) with the teacher's `logits` (B, K) or None, on the device. Return lines that say how
        steps run from now on, where that has changed.
        """
        lines = []
        (self.graph or self._run)(plan, logits, epoch)
        self.step.count(plan.shape[1] * self.batches.targets_each)
        if self.graph and self.graph.refusal:
            lines.append(f"steps run one operation at a time, not as a graph: {self.graph.refusal}")
            self.graph = None
        if self.step.refusal:
            lines.append(f"steps run as they are, not compiled: {self.step.refusal}")
            self.step.refusal = ""
        return lines

    def replays(self, plan: Tensor) -> bool:
        """Return whether a step on `plan` is the replay of a graph, which draws nothing on the host, nor on the device
        where there are other graphs.
        """
        return self.graph is not None and plan.shape[1] in self.graph.graphs

    def _run(self, plan: Tensor, logits: Tensor | None, epoch: int | Tensor) -> None:
        n = plan.shape[1]
        self.batch, self.logits = self.batches.batch(plan, self.batches.own(n)), logits
        if self.teacher is not None:
            self.logits = logits = self.teacher.of(self.batch, epoch)
        self.step.update(self.batch, epoch, logits, n)
