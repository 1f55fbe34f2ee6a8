"""The training batches of an epoch, as plans, each with the teacher's logits where they are computed ahead."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mdistiller.bank.teacher import WINDOW, TeacherLogits
from mdistiller.dataset import Batches


class Feed:
    """Gives a run's batches. `teacher` gives the logits of a plan, so that a step needs no pass of the teacher."""

    def __init__(self, batches: Batches, teacher: TeacherLogits | None = None):
        self.batches, self.teacher = batches, teacher

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def ahead(self) -> bool:
        """Whether the teacher's logits are there before the step; of pictures that are streamed it sees the batch."""
        return self.teacher is not None and not self.batches.streamed

    def plans(self, epoch: int, done: int, check: Callable[[], None]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the batches of `epoch` after its first `done`: the plan (4, B) and the teacher's logits (B, K) or None,
        on the device, of the samples that this process trains on. The teacher is asked for some batches together, first
        for as many as one of its passes takes, so that the first step comes soon; `check` is called after each pass.
        """
        size, samples = self.batches.batch_size, self.batches.samples_an_epoch
        plan = self.batches.plan(epoch)
        local = plan.to(self.batches.plan_device)  # one transfer an epoch
        self.batches.start(plan, done)
        each = self.batches.targets_each  # a block of text has many rows of logits
        rows = self.teacher.chunk if self.ahead else WINDOW
        stop = done * size
        while stop < samples:
            start, stop = stop, min(stop + size * max(1, rows // (size * each)), samples)
            rows = WINDOW
            parts = [slice(batch, min(batch + size, stop)) for batch in range(start, stop, size)]
            asked = [self._own(plan[:, part]) for part in parts] if self.ahead else []
            logits, end = self.teacher(torch.cat(asked, 1), check) if self.ahead else None, 0
            for number, part in enumerate(parts):
                begin, end = end, end + (each * asked[number].shape[1] if asked else 0)
                yield local[:, part], None if logits is None else logits[begin:end]

    def _own(self, plan: Tensor) -> Tensor:
        rows = self.batches.own(plan.shape[1])
        return plan if rows is None else plan[:, rows]

    def plan(self, epoch: int, number: int) -> tuple[Tensor, Tensor | None]:
        """Return plan and logits of one batch of `epoch`, counted from 0."""
        size = self.batches.batch_size
        plan = self.batches.plan(epoch)[:, number * size : (number + 1) * size]
        return plan.to(self.batches.plan_device), self.teacher(plan) if self.ahead else None
