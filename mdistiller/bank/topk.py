"""The form in which rows of logits over a vocabulary are kept: the k largest, and five numbers for all others.

At k = 64 a row is 276 bytes, where the vocabulary has 65,536 entries at most. `TopK.unpack` makes a dense row of it
again, on which every temperature rule and every divergence works unchanged. What it keeps:

- the largest logit in float32, and each of the k largest by its distance from that, in float16: softmax does not see a
  constant, so a language model's rows may lie anywhere, and at -500 float16 by itself has steps of 0.25;
- of the others, the tail: mean, variance and logsumexp at T = 1, but for float32's rounding. So the row's mean and
  deviation and every kept entry's probability at T = 1 are those of the whole row.

The tail comes back as two values: some of its entries have the higher one, and all others the lower one but a single
entry between them, which makes the three quantities exact though the entries are whole ones. A two-valued tail is one
that exists, so it holds at every temperature; and of all that have the three quantities it reaches least high, which
keeps its entries below the k largest. Which ones have the higher value cannot be known from the row, so chance decides,
anew for every row: a student cannot learn it, and comes to what one value for all of the tail teaches. Ones that are
the same in every row, such as the most frequent, it learns: that was worse (docs/language.md).
"""

import math

import torch
from torch import Tensor

from mdistiller.errors import RunFailed, UserError

WORD = torch.int16  # ids and numbers by their bit patterns
STEPS = 32  # bisections of log(count), log(V) wide at first
OF_LOG_PROBS = ("fixed", "learned")  # the rules that need no logit


class TopK:
    """Packs and unpacks logits (N, V), V = `vocabulary`, on `device`. Of a row the k largest are kept, all of them
    where k is 0 or that is no longer.

    `dtype`: of the kept logits; in float32 they are kept themselves, not their distances, so that whole rows stay as
    they are.
    """

    def __init__(
        self,
        k: int,
        vocabulary: int,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
    ):
        self.dtype, self.vocabulary = dtype, vocabulary
        # places on a circle, in steps of its golden section; banks on disk hang on them, so no generator draws them
        step = next(n for n in range(max(1, int(0.618 * vocabulary)), 2 * vocabulary) if math.gcd(n, vocabulary) == 1)
        self.ranks = (torch.arange(vocabulary, device=device) * step % vocabulary).int()
        self.order = self.ranks.argsort()
        self.id_words = 1 if self.vocabulary <= 2**16 else 2
        whole, size = 2 + self.vocabulary * dtype.itemsize // 2, dtype.itemsize // 2
        short = k * (self.id_words + size) + 2 * self.id_words + 8
        self.k = k if k and short < whole else 0
        self.width = short if self.k else whole  # words of a row

    def pack(self, logits: Tensor) -> Tensor:
        """Return logits (N, V) as words (N, width), int16.

        Of equal logits at the k-th place any are kept. A row with NaN or an infinite logit comes back with NaN. Raises
        RunFailed where `dtype` cannot hold a kept logit, by its distance from the largest.
        """
        logits, k = logits.float(), self.k
        best, ids = logits.topk(k + 1, 1)
        peak = best[:, :1] if self.dtype == torch.float16 else torch.zeros_like(best[:, :1])
        if not k:
            return torch.cat([_words(peak), _words(rounded(logits - peak, self.dtype))], 1)
        ids, kept = ids[:, :k], rounded(best[:, :k] - peak, self.dtype)
        low, high, middle, count = _two_values(*_moments(logits, ids, best[:, k:]), self.vocabulary - k)
        # those behind the row's start on the circle have the higher value; kept ones stand between and do not count
        start = self._start(ids)
        before = ((self.ranks[ids] - start) % self.vocabulary).sort(1).values - torch.arange(k, device=ids.device)
        place = self.order[(start + count + (before <= count).sum(1, keepdim=True)) % self.vocabulary]
        count = count + (before < count).sum(1, keepdim=True)
        least = kept[:, -1:].float()  # which rounding may have taken below the tail
        tail = [torch.minimum((value - peak).float(), least) for value in (low, high, middle)]
        return self._joined(peak, tail, torch.cat([ids, place, count], 1), kept)

    def unpack(self, words: Tensor) -> Tensor:
        """Return the dense rows (N, V), float32, of words (N, width)."""
        if not self.k:
            return _numbers(words[:, 2:], self.dtype).float() + _numbers(words[:, :2], torch.float32)
        numbers, ids, kept = words.split([8, (self.k + 2) * self.id_words, self.k * self.dtype.itemsize // 2], 1)
        peak, low, high, middle = _numbers(numbers, torch.float32).split(1, 1)
        ids = ids.long() & 0xFFFF if self.id_words == 1 else _numbers(ids, torch.int32).long()
        count, behind = ids[:, -1:].int(), self.ranks - self._start(ids[:, : self.k]).int()
        higher = ((behind >= 0) & (behind < count)) | (behind < count - self.vocabulary)
        dense = torch.where(higher, high + peak, low + peak)
        values = torch.cat([_numbers(kept, self.dtype).float(), middle], 1) + peak
        return dense.scatter_(1, ids[:, :-1], values)

    def of_log_probs(self, ids: Tensor, log_probs: Tensor, rule: str) -> Tensor:
        """Return words (N, width) of a teacher of which no more is known than its k most probable entries, `ids` (N, k)
        and their log-probabilities at T = 1, largest first, as servers give them. All others share what is left.

        Raises UserError for a temperature `rule` that looks at logits: log-probabilities are logits less a constant
        that is lost with them, and the mean and the deviation of a row are lost with the rest of it.
        """
        if rule not in OF_LOG_PROBS:
            raise UserError(
                f"TEMPERATURE.RULE: {rule} needs whole rows of logits, and of this teacher there are the largest "
                f"log-probabilities; set {' or '.join(OF_LOG_PROBS)}"
            )
        if ids.shape[1] != self.k:
            raise UserError(f"log-probabilities of the {self.k} largest are needed; got {ids.shape[1]}")
        peak = log_probs[:, :1].float() if self.dtype == torch.float16 else torch.zeros_like(log_probs[:, :1].float())
        kept = rounded(log_probs.float() - peak, self.dtype)
        left = (1 - log_probs.double().exp().sum(1, keepdim=True)).clamp(min=1e-9)
        level = (left.log() - math.log(self.vocabulary - self.k) - peak).float()
        level = torch.minimum(level, kept[:, -1:].float())
        taken = torch.ones(len(ids), self.vocabulary, dtype=torch.bool, device=ids.device).scatter_(1, ids, False)
        spare = taken.int().argmax(1, keepdim=True)  # any entry of the tail, which is flat
        return self._joined(peak, [level] * 3, torch.cat([ids, spare, torch.zeros_like(spare)], 1), kept)

    def _start(self, ids: Tensor) -> Tensor:
        """Return a rank (N, 1) for each row, which its kept `ids` (N, k) alone decide."""
        odd = 2 * torch.arange(ids.shape[1], device=ids.device) + 1
        return (ids * odd).sum(1, keepdim=True) % self.vocabulary

    def _joined(self, peak: Tensor, tail: list[Tensor], ids: Tensor, kept: Tensor) -> Tensor:
        ids = ids.to(WORD) if self.id_words == 1 else _words(ids.int())
        return torch.cat([_words(torch.cat([peak, *tail], 1)), ids, _words(kept)], 1)


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return logits in `dtype`. Raises RunFailed where it cannot hold one."""
    logits = exact.to(dtype)
    if dtype == torch.float16 and bool((logits.isinf() & exact.isfinite()).any()):
        largest = float(exact[exact.isfinite()].abs().max())
        raise RunFailed(
            f"the teacher's logits reach {largest:.3g}, more than float16 holds; set TEACHER_BANK_DTYPE float32"
        )
    return logits


def _words(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(WORD)


def _numbers(words: Tensor, dtype: torch.dtype) -> Tensor:
    return words.contiguous().view(dtype)


def _moments(logits: Tensor, ids: Tensor, ceiling: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, the deviation and log(mean(exp)) of each row of logits (N, V) without its `ids` (N, k): (N, 1)
    each, float64. `ceiling` (N, 1): the largest of the others.
    """
    n = logits.shape[1] - ids.shape[1]
    distance = (logits - ceiling).scatter_(1, ids, -torch.inf)
    mass = distance.exp().sum(1, keepdim=True).double() / n
    rough = distance.scatter_(1, ids, 0.0).sum(1, keepdim=True) / n
    distance.sub_(rough).scatter_(1, ids, 0.0)
    correction = distance.sum(1, keepdim=True).double() / n
    variance = distance.square_().sum(1, keepdim=True).double() / n - correction.square()
    return ceiling + rough + correction, variance.clamp(min=0.0).sqrt(), ceiling + mass.log()


def _two_values(mean: Tensor, deviation: Tensor, logmeanexp: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tail of n entries that has these three quantities (N, 1): its lower and its higher value, that of the
    entry between, and how many entries have the higher one, int64.

    With q = count + t, where the entry between has low + t (high - low), mean and deviation give both values for every
    q; the logmeanexp falls from q = 1, one entry far above the others, to q = n - 1, and is looked for there.
    """

    def at(q: Tensor) -> tuple[Tensor, ...]:
        count = q.floor()
        t = q - count
        gap = deviation / ((count + t * t) / n - (q / n).square()).sqrt()
        return mean - gap * q / n, gap, t, count

    lower, upper = torch.zeros_like(mean), torch.full_like(mean, n - 1).log()
    for _ in range(STEPS):
        half = (lower + upper) / 2
        low, gap, t, count = at(half.exp())
        found = low + gap + ((count + (gap * (t - 1)).exp() + (n - 1 - count) * (-gap).exp()) / n).log()
        too_high = found > logmeanexp
        lower, upper = torch.where(too_high, half, lower), torch.where(too_high, upper, half)
    low, gap, t, count = at(((lower + upper) / 2).exp().clamp(1, n - 1))
    return low, low + gap, low + t * gap, count.nan_to_num(1.0).long().clamp(1, n - 1)
