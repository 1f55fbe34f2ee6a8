"""Rows of which the k largest are kept: temperatures, masses, edges, and what is refused."""

import math

import pytest
import torch

from mdistiller.bank.text import Rows
from mdistiller.bank.topk import TopK
from mdistiller.distillers.losses import kl_divergence
from mdistiller.distillers.rules import centred, fixed, max_logit, norm, std
from mdistiller.errors import RunFailed, UserError

DTYPES = [torch.float16, torch.float32]


def rows(n=64, vocabulary=512, shift=0.0):
    """Heavy-tailed rows with three raised entries, and how often each entry is said to be in the text."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, vocabulary, generator=generator)
    logits += torch.empty(n, vocabulary).exponential_(generator=generator)
    raised = torch.randint(0, vocabulary, (n, 3), generator=generator)
    logits.scatter_add_(1, raised, 6 + torch.randn(n, 3, generator=generator))
    return logits + shift, torch.randint(0, 1000, (vocabulary,), generator=generator)


def back(logits, k, counts=None, dtype=torch.float16):
    form = TopK(k, torch.zeros(logits.shape[1]) if counts is None else counts, dtype)
    words = form.pack(logits)
    assert words.dtype == torch.int16 and words.shape == (len(logits), form.width)
    dense = form.unpack(words)
    assert dense.dtype == torch.float32 and dense.shape == logits.shape
    return dense


def test_what_a_token_costs():
    assert 2 * TopK(64, torch.zeros(2048)).width == 276
    assert 2 * TopK(64, torch.zeros(2**16)).width == 276
    assert 2 * TopK(64, torch.zeros(2**16 + 1)).width == 64 * 6 + 24
    assert 2 * TopK(0, torch.zeros(2048)).width == 2 * TopK(2048, torch.zeros(2048)).width == 2 * 2048 + 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, -500.0])
@pytest.mark.parametrize("k", [4, 16, 64])
@pytest.mark.parametrize("rule", [fixed, max_logit, centred, std, norm])
def test_temperatures_are_those_of_the_whole_row(rule, k, shift, dtype):
    logits, counts = rows(shift=shift)
    student = rows(vocabulary=512)[0].flip(0)
    exact, found = (rule(student, teacher, 1.0) for teacher in (logits, back(logits, k, counts, dtype)))
    assert torch.equal(exact.sound, found.sound)
    for a, b in zip(exact[:3], found[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=0)


@pytest.mark.parametrize("k", [4, 16, 64])
def test_probabilities_are_those_of_the_whole_row(k):
    logits, counts = rows()
    dense, ids = back(logits, k, counts), logits.topk(k).indices
    below = [(0.5, 0.02)] if k == 64 else []  # fewer leave more to the tail than it can tell for colder rows
    for temperature, allowed in ((1.0, 1e-3), (2.0, 0.05), (4.0, 0.05), *below):
        exact, found = ((z / temperature).softmax(1) for z in (logits, dense))
        assert (exact.gather(1, ids).sum(1) - found.gather(1, ids).sum(1)).abs().max() < allowed, temperature
    assert torch.allclose(dense.gather(1, ids), logits.gather(1, ids), atol=0.01)
    others = dense.scatter(1, ids, -math.inf)
    assert (others.amax(1) <= dense.gather(1, ids).amin(1)).all(), "no entry of the tail is taken for a kept one"


def test_the_tail_leads_the_student_nearly_as_the_whole_row_does():
    logits, counts = rows(vocabulary=1024)
    student = (0.6 * logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()

    def gradient(teacher):
        return torch.autograd.grad(kl_divergence(student, teacher, 1.0, 1.0).sum(), student)[0]

    exact = gradient(logits)
    flat = logits.scatter(1, logits.topk(1024 - 64, largest=False).indices, -1e4)
    errors = [(gradient(z) - exact).norm() / exact.norm() for z in (back(logits, 64, counts), flat)]
    assert errors[0] < 0.05 and errors[0] < errors[1] / 3, "against a teacher without a tail"


def test_the_more_frequent_entries_have_the_higher_value():
    logits, counts = rows(8)
    for row, dense in zip(logits, back(logits, 16, counts), strict=True):
        tail = torch.ones(512, dtype=torch.bool)
        tail[row.topk(16).indices] = False
        order = counts.argsort(descending=True, stable=True)
        values = dense[order][tail[order]]
        assert (values.diff() <= 0).all() and 2 <= len(values.unique()) <= 3


@pytest.mark.parametrize("k", [0, 512, 10_000])
def test_all_entries_are_kept_where_that_is_asked_or_no_longer(k):
    logits, _ = rows()
    assert torch.equal(back(logits, k, dtype=torch.float32), logits), "to the bit"
    peak = logits.amax(1, keepdim=True)
    assert torch.equal(back(logits, k), (logits - peak).half().float() + peak), "distances in float16"
    for vocabulary in (1, 2, 3, 12, 13, 14, 20, 138):  # 138: as many words whole as with k = 64
        some = rows(vocabulary=vocabulary + 3)[0][:, :vocabulary]
        for few in (1, 2, 64):
            assert (back(some, few).amax(1) - some.amax(1)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_of_any_size(dtype):
    for vocabulary in (2**15 + 5, 2**16, 70_000):
        logits = torch.full((2, vocabulary), -3.0)
        logits[:, -1], logits[:, -2], logits[:, 40_000 % vocabulary] = 5.0, 4.0, 3.0
        dense = back(logits, 3, dtype=dtype)
        assert torch.equal(dense, logits)


def test_constant_rows_and_ties():
    logits = torch.full((3, 100), 7.3)
    logits[1, 50:] = 2.0
    logits[2, :10] = 9.0
    dense = back(logits, 10)
    torch.testing.assert_close(dense[0], logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(dense.mean(1), logits.mean(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(dense[1:].std(1), logits[1:].std(1), rtol=1e-4, atol=0)
    assert torch.equal(dense[2, :10], logits[2, :10])


def test_a_row_does_not_depend_on_the_others():
    logits, counts = rows()
    form = TopK(16, counts)
    words = form.pack(logits)
    assert torch.equal(form.pack(logits[20:23]), words[20:23])
    logits[5, 3], logits[6, 3], logits[7, 3] = math.nan, math.inf, -math.inf
    dense = form.unpack(form.pack(logits))
    assert dense.isnan().any(1).nonzero().flatten().tolist() == [5, 6, 7]
    others = torch.tensor([row for row in range(64) if row not in (5, 6, 7)])
    assert torch.equal(form.pack(logits)[others], words[others])


def test_logits_that_float16_cannot_hold_are_refused():
    logits, _ = rows()
    logits[3, 7] = 1e6
    with pytest.raises(RunFailed, match=r"more than float16 holds; set TEACHER_BANK_DTYPE float32"):
        back(logits, 4)
    assert back(logits, 4, dtype=torch.float32)[3, 7] == 1e6
    logits[3, 7] = -1e6  # in the tail
    dense = back(logits, 4)
    torch.testing.assert_close(dense.mean(1), logits.mean(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dense.logsumexp(1), logits.logsumexp(1), rtol=0, atol=2e-3)


def test_rows_are_sliced_before_they_are_dense():
    logits, counts = rows()
    form = TopK(16, counts)
    packed = Rows(form.pack(logits), form)
    assert len(packed) == 64 and torch.equal(packed[8:24][2:5].float(), packed.float()[10:13])


def test_log_probabilities_alone_serve_the_rules_that_need_no_logit():
    logits, counts = rows()
    kept, ids = logits.log_softmax(1).topk(16)
    form = TopK(16, counts)
    dense = form.unpack(form.of_log_probs(ids, kept, "fixed"))
    torch.testing.assert_close(dense.softmax(1).gather(1, ids), kept.exp(), rtol=5e-3, atol=0)
    tail = dense.scatter(1, ids, 0.0)
    assert (tail.topk(17, 1).values[:, -1] <= 0).all() and (tail.ne(0).sum(1) == 512 - 16).all()
    for rule in ("max_logit", "centred", "std", "norm", "sharpness", "centred_sharpness", "erratum"):
        with pytest.raises(UserError, match=f"TEMPERATURE.RULE: {rule} needs whole rows of logits.*set fixed"):
            form.of_log_probs(ids, kept, rule)
    with pytest.raises(UserError, match="the 16 largest are needed; got 8"):
        form.of_log_probs(ids[:, :8], kept[:, :8], "fixed")
