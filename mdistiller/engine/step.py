"""One training step: forward, backward, update."""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from mdistiller.bank.text import Rows
from mdistiller.dataset import Batch
from mdistiller.device import AMP_DTYPES, at_least_float32, autocast
from mdistiller.distillers import check_output, method_name
from mdistiller.engine.ranks import ALONE, Ranks, draws, own_passes, parts_of
from mdistiller.engine.solver import DOT
from mdistiller.errors import RunFailed, users_code
from mdistiller.runs.temperature import EpochBuffer


class Meter:
    """Sums over the samples of an epoch, kept on the device until somebody reads them.

    Each sum stays the same tensor, so that a captured step goes on adding to it.
    """

    def __init__(self):
        self.images = 0  # that went through a step, whether or not it counts
        self.sums: dict[str, Tensor] = {}

    def reset(self) -> None:
        self.images = 0
        for value in self.sums.values():
            value.zero_()

    def add(self, images: int, sound: Tensor, **values: Tensor) -> None:
        """Add `values`, sums over `images` samples, which count where `sound`, a 0-dim bool, is true."""
        values |= {"samples": sound.new_full((), images, dtype=torch.float32), "skipped": ~sound}
        for name, value in values.items():
            value = value.float() if name == "skipped" else torch.where(sound, value.float(), 0.0)
            if name in self.sums:
                self.sums[name].add_(value)
            else:
                self.sums[name] = value.clone()

    def read(self) -> dict[str, float]:
        """Return the means so far over the samples that count, and the number of skipped steps; waits for the
        device.
        """
        if not self.sums:
            return {}
        values = dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist(), strict=True))
        samples, skipped = values.pop("samples"), values.pop("skipped")
        return {name: value / samples if samples else math.nan for name, value in values.items()} | {"skipped": skipped}


class Part(NamedTuple):
    """What a part of a batch has come to; losses and loss are its share of the batch's, over all ranks."""

    loss: Tensor
    losses: dict[str, Tensor]
    correct: Tensor | None  # how many samples were classified right; None: nothing is classified
    extra: list[Tensor | None]  # gradients of distillation, under DOT


def sum_of(values: Sequence[Tensor | None]) -> Tensor | None:
    """Return the sum of the values, where there are some."""
    there = [value for value in values if value is not None]
    return functools.reduce(torch.add, there) if there else None


def hits(logits: Tensor, target: Tensor) -> Tensor:
    """Return how many of the logits (B, K), or predicted classes (B,), are right by labels (B,) or soft ones (B, K)."""
    label = target if target.ndim == 1 else target.argmax(1)
    return ((logits if logits.ndim == 1 else logits.argmax(1)) == label).sum()


class Piece(NamedTuple):
    """What goes through the networks at a time: this rank's samples of a part of a batch."""

    batch: Batch
    logits: Tensor | Rows | None  # the teacher's
    share: float  # of the batch's loss that this rank's loss on it is
    sizes: list[int]  # how many samples of the part each rank has


def _samples(values: Tensor | Rows, start: int, stop: int, n: int) -> Tensor | Rows:
    """Return what `values` has of the samples from `start` to `stop` of `n`: a block of text has many rows of some."""
    each = len(values) // n
    return values[start * each : stop * each]


class Step:
    """Trains a distiller on batches, in the precision `amp`.

    A step whose loss or gradients are not finite changes nothing: neither parameters nor momenta. Under the policy
    "stop" the run ends there; under "skip" the step counts in the meter, its BatchNorm statistics and other buffers
    are put back, and training goes on. Off the CPU a look at every loss would stall the device: there the decision is
    taken on the device, and under "stop" no later step changes a parameter either, until `bad_step` is read.

    `forward`: the distiller's compiled form, where it is to be tried from the epoch `compiled_from` on; `refusal` says
    why it is not used any more.
    """

    def __init__(
        self,
        distiller: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        amp: str = "none",
        nan_policy: str = "stop",
        forward: Callable | None = None,
        compiled_from: int = 1,
    ):
        self.distiller, self.optimizer = distiller, optimizer
        self.device, self.amp = device, amp
        self.forward, self.compiled_from, self.refusal = forward, compiled_from, ""
        self.skip = nan_policy == "skip"
        self.clip = 0.0  # largest norm of the gradient; 0: none
        self.parts = 1  # of a batch, that go through the networks one after the other
        self.ranks: Ranks = ALONE
        fp16 = AMP_DTYPES[amp] is torch.float16
        self.meter = Meter()
        self.temperatures: EpochBuffer | None = None  # where a method under a temperature rule leaves its record
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.steps = 0
        self._number = torch.zeros((), dtype=torch.int64, device=device)  # `steps` on the device
        self._first_bad = torch.full((), -1, device=device)  # number of the first bad step, under "stop"
        # only these can leave an update out on the device; GradScaler has its own way
        fused = optimizer.defaults.get("fused") is True or (isinstance(optimizer, DOT) and device.type == "cuda")
        self.lazy = fused and not fp16

    def __call__(self, batch: Batch, epoch: int, logits_teacher: Tensor | None = None) -> None:
        """Train on `batch`. `logits_teacher` (B, K) stand for a teacher's pass, for a method that takes them."""
        self.update(batch, epoch, logits_teacher)
        self.count(len(batch.target))

    def count(self, images: int) -> None:
        """Count a step of `images` samples on the host; `update`, or a graph of it, does the rest."""
        self.steps += 1
        self.meter.images += images

    def update(
        self, batch: Batch, epoch: int | Tensor, logits_teacher: Tensor | None = None, whole: int | None = None
    ) -> None:
        """Do all of a step that happens on the device. Every tensor that outlives it stays the same tensor. `whole`:
        how many samples the batch has of which `batch` is this rank's part.
        """
        self.optimizer.zero_grad(set_to_none=True)
        before = [(buffer, buffer.clone()) for buffer in self.buffers()] if self.skip else []
        parts = [self._backward(piece, epoch) for piece in self._pieces(batch, logits_teacher, whole)]
        extra = [sum_of(gradients) for gradients in zip(*(part.extra for part in parts), strict=True)]
        with torch.no_grad():
            loss = sum_of([part.loss for part in parts])
            correct = sum_of([part.correct for part in parts])
            counts = {} if correct is None else {"correct": correct}
            losses = {name: sum_of([part.losses[name] for part in parts]) for name in parts[0].losses}
            if self.ranks.world > 1:
                counts = {name: value.to(loss.dtype) for name, value in counts.items()}
                gradients = [p.grad for p in self.parameters if p.grad is not None]
                gradients += [gradient for gradient in extra if gradient is not None]
                self.ranks.sum([*gradients, loss, *counts.values(), *losses.values()])
            sound = self._change_parameters(loss, (extra,) if isinstance(self.optimizer, DOT) else ())
            for buffer, value in before:
                buffer.copy_(torch.where(sound, buffer, value))
            n = len(batch.target) if whole is None else whole * (len(batch.target) // len(batch.image))
            terms = {f"loss/{name}": n * value for name, value in losses.items()}
            self.meter.add(n, sound, loss=n * loss, **counts, **terms)
            self._number += 1

    @property
    def gathers(self) -> bool:
        """Whether the method compares samples of a batch, which lie on several ranks: each sees the outputs of all."""
        return self.ranks.world > 1 and self.distiller.needs_batch

    def _pieces(self, batch: Batch, logits: Tensor | Rows | None, whole: int | None) -> Iterator[Piece]:
        n, start = len(batch.image), 0
        whole = whole or n
        for part in parts_of(whole, self.parts):
            sizes, own = self.ranks.sizes(len(part)), len(self.ranks.own(part))
            share = len(part) / self.ranks.world / whole if self.gathers else own / whole
            if own == n:
                yield Piece(batch, logits, share, sizes)
                return
            stop = start + own
            given = None if logits is None else _samples(logits, start, stop, n)
            yield Piece(type(batch)(*(_samples(values, start, stop, n) for values in batch)), given, share, sizes)
            start = stop

    @contextlib.contextmanager
    def _gathering(self, sizes: list[int]) -> Iterator[None]:
        """Let the networks give the outputs for all ranks' samples, which have `sizes` of them, with their gradient."""
        distiller, ranks = self.distiller, self.ranks

        def gathered(value: object) -> object:
            if isinstance(value, (list, tuple)):
                return [gathered(item) for item in value]
            return ranks.gather(value, sizes) if isinstance(value, Tensor) else value

        def of_all(_network: nn.Module, _inputs: tuple, output: tuple) -> tuple:
            logits, feats = output
            read = distiller.needs_features or feats
            return ranks.gather(logits, sizes), {n: gathered(v) if n in read else v for n, v in feats.items()}

        handles = own_passes(distiller.student, ranks) if draws(distiller.student) else []
        networks = [net for net in (distiller.student, distiller.teacher) if net is not None]
        handles += [network.register_forward_hook(of_all) for network in networks]
        start = sum(sizes[: ranks.rank])
        distiller.rows = slice(start, start + sizes[ranks.rank])
        try:
            yield
        finally:
            distiller.rows = None
            for handle in handles:
                handle.remove()

    def _backward(self, piece: Piece, epoch: int | Tensor) -> Part:
        """Add the gradients of a piece."""
        batch, logits_teacher, share, sizes = piece
        context = self.ranks.own_draws()
        if self.gathers:
            each = len(batch.target) // len(batch.image)
            rows = [each * size for size in sizes]
            target, index = (self.ranks.gather(values, rows) for values in (batch.target, batch.index))
            batch, context = batch._replace(target=target, index=index), self._gathering(sizes)
            if logits_teacher is not None:
                logits_teacher = self.ranks.gather(logits_teacher.float(), rows)
        if self.temperatures is not None:
            self.distiller.observer = functools.partial(self.temperatures.put, batch.index)
        if isinstance(logits_teacher, Rows) and not self.distiller.chunk:
            logits_teacher = logits_teacher.float()
        given = {} if logits_teacher is None else {"logits_teacher": logits_teacher}
        given |= batch._asdict() | {"epoch": epoch}
        with context, autocast(self.device, self.amp):
            output = self._forward(given)
            if not self.steps:
                check_output(self.distiller, output, len(batch.target))
            logits, losses = output
            # a method may return terms of any shape, as mdistiller's loop allows
            losses = {name: at_least_float32(value).mean() for name, value in losses.items()}
            if share != 1:
                losses = {name: share * value for name, value in losses.items()}
            loss = sum(losses.values())
        extra = self.distillation_gradients(losses) if isinstance(self.optimizer, DOT) else []
        try:
            self.scaler.scale(loss).backward()
        except RuntimeError as error:  # what the method did wrong shows only here, where no line of it is left to name
            if not re.search("inplace operation|through the graph a second time", str(error)):
                raise
            raise RunFailed(
                f"{method_name(self.distiller)}: no gradient of its losses: {error}".split("\n")[0]
            ) from error
        losses = {name: value.detach() for name, value in losses.items()}
        correct = None if logits is None else hits(logits, batch.target)
        return Part(loss.detach(), losses, correct * (self.ranks.rank == 0) if self.gathers else correct, extra)

    def _forward(self, given: dict) -> tuple[Tensor, dict[str, Tensor]]:
        epoch = given["epoch"]
        # under a graph the epoch is a tensor on the device, which must not be looked at: graphs compile from 1 on
        if self.forward is not None and (self.compiled_from == 1 or epoch >= self.compiled_from):
            if not isinstance(epoch, Tensor):  # each number would be compiled anew
                epoch = torch.full((), float(epoch), device=self.device)
            try:
                return self.forward(**given | {"epoch": epoch})
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # a mistake that is not the compiler's comes again below
                self.forward, self.refusal = None, (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if isinstance(epoch, Tensor):  # what fails as part of a graph comes again, with a number
            return self.distiller(**given)
        with users_code(f"{'a' if self.steps else 'the first'} training step of {method_name(self.distiller)}"):
            return self.distiller(**given)

    def _change_parameters(self, loss: Tensor, extra: tuple) -> Tensor:
        """Update the parameters where loss and gradients are finite. Return whether they are, a 0-dim bool."""
        sound = loss.isfinite()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not self.scaler.is_enabled():  # scaled gradients overflow at times, which the scaler is there for
            sound = sound & get_total_norm(gradients, torch.inf).isfinite()
        if self.clip and (self.lazy or sound):  # on the device the norm of what is not sound scales nothing
            self.scaler.unscale_(self.optimizer)  # nothing where it is not enabled
            factor = (self.clip / (get_total_norm(gradients) + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
            torch._foreach_mul_([*gradients, *(g for part in extra for g in part if g is not None)], factor)
        if not self.skip:
            self._first_bad.copy_(torch.where(sound | (self._first_bad >= 0), self._first_bad, self._number))
            sound = self._first_bad < 0
        if self.lazy:
            self.optimizer.found_inf = (~sound).float()
            self.optimizer.step(*extra)
        elif sound:
            self.scaler.step(self.optimizer, *extra)
            self.scaler.update()
        return sound

    def buffers(self) -> list[Tensor]:
        """Return what a forward pass changes: all buffers but those of a teacher in eval mode."""
        teacher = self.distiller.teacher
        frozen = teacher is not None and not teacher.training
        return [b for name, b in self.distiller.named_buffers() if not (frozen and name.startswith("teacher."))]

    def bad_step(self) -> int:
        """Return the number (from 0) of the first step that was not sound under the policy "stop", -1 for none; waits
        for the device.
        """
        return int(self._first_bad)

    def distillation_gradients(self, losses: dict[str, Tensor]) -> list[Tensor | None]:
        """Return the gradients of all losses but the method's `task_losses`, by parameter of the DOT optimizer; the
        graph stays for backward(). Raises RunFailed where the method's losses are not of both kinds.
        """
        distillation = [loss for name, loss in losses.items() if name not in self.distiller.task_losses]
        if not 0 < len(distillation) < len(losses):
            raise RunFailed(
                f"SOLVER.TRAINER: dot needs a task loss (such as loss_ce) and another one, and "
                f"{method_name(self.distiller)} gives {', '.join(losses)}; set SOLVER.TRAINER base"
            )
        loss = self.scaler.scale(sum(distillation))
        learning = [p for p in self.parameters if p.requires_grad]  # a student may be frozen in part
        found = iter(torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True))
        gradients = [next(found) if p.requires_grad else None for p in self.parameters]
        if not self.scaler.is_enabled():
            return gradients
        scale = self.scaler.scale(torch.ones((), device=self.device))
        return [gradient if gradient is None else gradient / scale for gradient in gradients]
