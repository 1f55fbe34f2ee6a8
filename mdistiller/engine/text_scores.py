"""Figures of a network of text on a test: how well it predicts the next token, and how close it is to its teacher."""

import itertools
import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from mdistiller.dataset import TokenBatches
from mdistiller.device import autocast
from mdistiller.distillers.losses import kl_divergence
from mdistiller.engine.evaluator import evaluation_batches, loaded_networks
from mdistiller.engine.ranks import ALONE, Ranks
from mdistiller.errors import OtherNetwork
from mdistiller.models import in_eval_mode

ROWS = 1024  # whose logits exist at a time
TIMED = 20  # batches by which a speed is measured
BINS = 15  # of the calibration error
SCALES = 2.0 ** (0.3 * torch.arange(-10, 11))  # inverse temperatures at which the loss is known: 1/8 to 8


class TextScores(NamedTuple):
    top1: float  # percent
    top5: float  # percent
    loss: float  # mean cross entropy in nats
    more: dict[str, float]  # the other figures of TextTest

    by_loss = True

    @property
    def score(self) -> float:
        return self.top1

    @property
    def figures(self) -> dict[str, float]:
        """What a row of metrics.jsonl has of them."""
        return {"test_acc": self.top1, "test_acc_top5": self.top5, "test_loss": self.loss} | self.more


class TextTest:
    """Called with a network of text: its TextScores on the blocks of `batches`, which lie on the device.

    `more` has bits_per_byte; loss_calibrated, the loss after one temperature, which is fitted on one half of the tokens
    and counts on the other, both ways; ece, the expected calibration error in percent; and beside a `teacher`
    teacher_kl, KL(teacher || network) at temperature 1 in nats, and teacher_agreement, percent of tokens for which both
    predict the same. The teacher's last hidden states are kept, (N, C) float32: it runs once.
    """

    def __init__(
        self, batches: TokenBatches, bytes_a_token: float, amp: str = "none", teacher: nn.Module | None = None,
        ranks: Ranks = ALONE,
    ):  # fmt: skip
        self.batches, self.bytes_a_token, self.amp, self.teacher = batches, bytes_a_token, amp, teacher
        self.ranks = ranks
        self.kept: list[Tensor] = []  # the teacher's hidden states, by batch

    @torch.no_grad()
    def __call__(self, network: nn.Module, batches=None) -> TextScores:
        """`batches`: those of the test, where somebody watches over them."""
        device, count = self.batches.images.device, self.batches.num_samples * self.batches.targets_each
        half = torch.arange(count, device=device) * 2 // count  # of each token
        sums, bins = torch.zeros(5, dtype=torch.float64, device=device), torch.zeros(3, BINS, device=device)
        scaled = torch.zeros(2, len(SCALES), dtype=torch.float64, device=device)
        with in_eval_mode(network), autocast(device, self.amp):
            for number, (ids, target, index) in enumerate(batches or self.batches):
                hidden, of_teacher = network.hidden(ids), self._teacher(number, ids)
                for rows in torch.arange(len(target), device=device).split(ROWS):
                    logits, label = network.head(hidden[rows]).float(), target[rows]
                    teacher = None if of_teacher is None else self.teacher.head(of_teacher[rows]).float()
                    self._add(logits, label, teacher, sums, bins)
                    scaled.index_add_(0, half[index[rows]], _losses(logits, label))
        self.ranks.sum([sums, bins, scaled])
        loss, hits, top5, kl, agreed = (sums / count).tolist()
        seen, right, trust = bins.cpu()
        more = {
            "bits_per_byte": loss / math.log(2) / self.bytes_a_token,
            "loss_calibrated": calibrated(scaled.cpu().numpy(), torch.bincount(half, minlength=2).cpu().numpy()),
            "ece": 100 * float((right - trust).abs().sum() / seen.sum()),
        }
        if self.teacher is not None:
            more |= {"teacher_kl": kl, "teacher_agreement": 100 * agreed}
        return TextScores(100 * hits, 100 * top5, loss, more)

    def _teacher(self, number: int, ids: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        if number < len(self.kept):
            return self.kept[number]
        with in_eval_mode(self.teacher):
            hidden = self.teacher.hidden(ids).float()
        if not isinstance(self.teacher.head, nn.Identity):  # else they are logits, of the whole test
            self.kept.append(hidden)
        return hidden

    def _add(self, logits: Tensor, label: Tensor, teacher: Tensor | None, sums: Tensor, bins: Tensor) -> None:
        logp = logits.log_softmax(1)
        own = logp.gather(1, label[:, None])[:, 0]
        trust, predicted = logp.max(1)
        hit = predicted == label
        top5 = (logp > own[:, None]).sum(1) < 5
        both = torch.zeros(2, device=logits.device)
        if teacher is not None:
            both = torch.stack([kl_divergence(logits, teacher, 1.0, 1.0).sum(), (teacher.argmax(1) == predicted).sum()])
        sums += torch.cat([torch.stack([-own.sum(), hit.sum(), top5.sum()]), both])
        trust = trust.exp()
        place = (trust * BINS).long().clamp(max=BINS - 1)
        bins.index_add_(1, place, torch.stack([torch.ones_like(trust), hit.float(), trust]))


def _losses(logits: Tensor, label: Tensor) -> Tensor:
    """Return the loss of each row of logits (n, V) times each of SCALES, (n, SCALES) float64."""
    at_label, scales = logits.gather(1, label[:, None])[:, 0].double(), SCALES.tolist()
    return torch.stack([torch.logsumexp(s * logits, 1).double() - s * at_label for s in scales], 1)


def calibrated(sums: np.ndarray, counts: np.ndarray) -> float:
    """Return the loss after one temperature, fitted on one half and counted on the other, from sums (2, SCALES) of both
    halves' losses: between the scales by a polynomial through five of them.
    """
    x, total = np.arange(len(SCALES), dtype=float), 0.0
    for fitted, other in ((0, 1), (1, 0)):
        middle = int(np.clip(sums[fitted].argmin(), 2, len(x) - 3))
        near, fine = slice(middle - 2, middle + 3), np.linspace(middle - 2, middle + 2, 401)
        curves = [
            np.polyval(np.polyfit(x[near] - middle, sums[side][near], 4), fine - middle) for side in (fitted, other)
        ]
        total += curves[1][curves[0].argmin()]
    return float(total / counts.sum())


class TextReport(NamedTuple):
    """What tools/eval.py shows of a network of text."""

    scores: TextScores
    parameters: int
    tokens_per_second: float  # of its logits, some rows at a time


def evaluate_text(
    networks: Mapping[str, tuple[str, str]], section: CfgNode, batch_size: int, device: torch.device, amp: str = "none"
) -> dict[str, TextReport]:
    """Return the reports on `networks` of text, as `loaded_networks` takes them, and raises; the others are compared
    with the one that is called "teacher".
    """
    try:
        data, loaded = loaded_networks(networks, section, batch_size, device)
    except OtherNetwork as error:
        raise OtherNetwork(f"{error}; or set DATASET.TEXT.TOKENIZER and VOCABULARY as its run did") from None
    batches, reports = evaluation_batches(data, batch_size), {}
    beside = TextTest(batches, data.bytes_a_token, amp, loaded.get("teacher"))
    for what, network in loaded.items():
        test = TextTest(batches, data.bytes_a_token, amp) if what == "teacher" else beside
        count = sum(p.numel() for p in network.parameters())
        reports[what] = TextReport(test(network), count, speed_of(network, batches, amp))
    return reports


@torch.no_grad()
def speed_of(network: nn.Module, batches: TokenBatches, amp: str) -> float:
    """Return tokens a second through the network, on at most TIMED batches."""
    begin, tokens = time.monotonic(), 0
    with in_eval_mode(network), autocast(batches.images.device, amp):
        for ids, target, _ in itertools.islice(batches, TIMED):
            for part in network.hidden(ids).split(ROWS):
                last = network.head(part).sum()
            tokens += len(target)
    last.item()  # the device has finished
    return tokens / (time.monotonic() - begin)
