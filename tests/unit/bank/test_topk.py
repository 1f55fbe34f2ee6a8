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
    """Heavy-tailed rows with three raised entries."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, vocabulary, generator=generator)
    logits += torch.empty(n, vocabulary).exponential_(generator=generator)
    raised = torch.randint(0, vocabulary, (n, 3), generator=generator)
    logits.scatter_add_(1, raised, 6 + torch.randn(n, 3, generator=generator))
    return logits + shift


def back(logits, k, dtype=torch.float16):
    form = TopK(k, logits.shape[1], dtype)
    words = form.pack(logits)
    assert words.dtype == torch.int16 and words.shape == (len(logits), form.width)
    dense = form.unpack(words)
    assert dense.dtype == torch.float32 and dense.shape == logits.shape
    return dense


def test_what_a_token_costs():
    assert 2 * TopK(64, 2048).width == 276
    assert 2 * TopK(64, 2**16).width == 276
    assert 2 * TopK(64, 2**16 + 1).width == 64 * 6 + 24
    assert 2 * TopK(0, 2048).width == 2 * TopK(2048, 2048).width == 2 * 2048 + 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, -500.0])
@pytest.mark.parametrize("k", [4, 16, 64])
@pytest.mark.parametrize("rule", [fixed, max_logit, centred, std, norm])
def test_temperatures_are_those_of_the_whole_row(rule, k, shift, dtype):
    logits = rows(shift=shift)
    student = rows().flip(0)
    exact, found = (rule(student, teacher, 1.0) for teacher in (logits, back(logits, k, dtype)))
    assert torch.equal(exact.sound, found.sound)
    for a, b in zip(exact[:3], found[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=0)


@pytest.mark.parametrize("k", [4, 16, 64])
def test_probabilities_are_those_of_the_whole_row(k):
    logits = rows()
    dense, ids = back(logits, k), logits.topk(k).indices
    below = [(0.5, 0.02)] if k == 64 else []  # fewer leave more to the tail than it can tell for colder rows
    for temperature, allowed in ((1.0, 1e-3), (2.0, 0.05), (4.0, 0.05), *below):
        exact, found = ((z / temperature).softmax(1) for z in (logits, dense))
        assert (exact.gather(1, ids).sum(1) - found.gather(1, ids).sum(1)).abs().max() < allowed, temperature
    assert torch.allclose(dense.gather(1, ids), logits.gather(1, ids), atol=0.01)
    others = dense.scatter(1, ids, -math.inf)
    assert (others.amax(1) <= dense.gather(1, ids).amin(1)).all(), "no entry of the tail is taken for a kept one"


def test_the_tail_leads_the_student_nearly_as_the_whole_row_does():
    logits = rows(vocabulary=1024)
    student = (0.6 * logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()

    def gradient(teacher):
        return torch.autograd.grad(kl_divergence(student, teacher, 1.0, 1.0).sum(), student)[0]

    exact = gradient(logits)
    flat = logits.scatter(1, logits.topk(1024 - 64, largest=False).indices, -1e4)
    errors = [(gradient(z) - exact).norm() / exact.norm() for z in (back(logits, 64), flat)]
    assert errors[0] < 0.05 and errors[0] < errors[1] / 3, "against a teacher without a tail"


def test_chance_gives_the_higher_value_anew_for_every_row():
    logits = rows(512)
    dense, kept = back(logits, 16), logits.topk(16).indices
    others = dense.scatter(1, kept, math.nan)
    for row in others[:8]:
        assert 2 <= len(row[~row.isnan()].unique()) <= 3
    high = others == others.nan_to_num(-math.inf).amax(1, keepdim=True)
    shares = high.sum(0) / (~others.isnan()).sum(0)
    assert (shares - shares.mean()).abs().max() < 0.15, "no entry has it more often than others"
    assert (high[0] ^ high[1]).float().mean() > 0.1, "nor have the same ones it in two rows"


@pytest.mark.parametrize("k", [0, 512, 10_000])
def test_all_entries_are_kept_where_that_is_asked_or_no_longer(k):
    logits = rows()
    assert torch.equal(back(logits, k, dtype=torch.float32), logits), "to the bit"
    peak = logits.amax(1, keepdim=True)
    assert torch.equal(back(logits, k), (logits - peak).half().float() + peak), "distances in float16"
    for vocabulary in (1, 2, 3, 12, 13, 14, 20, 138):  # 138: as many words whole as with k = 64
        some = rows(vocabulary=vocabulary + 3)[:, :vocabulary]
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
    logits = rows()
    form = TopK(16, 512)
    words = form.pack(logits)
    assert torch.equal(form.pack(logits[20:23]), words[20:23])
    logits[5, 3], logits[6, 3], logits[7, 3] = math.nan, math.inf, -math.inf
    dense = form.unpack(form.pack(logits))
    assert dense.isnan().any(1).nonzero().flatten().tolist() == [5, 6, 7]
    others = torch.tensor([row for row in range(64) if row not in (5, 6, 7)])
    assert torch.equal(form.pack(logits)[others], words[others])


def test_logits_that_float16_cannot_hold_are_refused():
    logits = rows()
    logits[3, 7] = 1e6
    with pytest.raises(RunFailed, match=r"more than float16 holds; set TEACHER_BANK_DTYPE float32"):
        back(logits, 4)
    assert back(logits, 4, dtype=torch.float32)[3, 7] == 1e6
    logits[3, 7] = -1e6  # in the tail
    dense = back(logits, 4)
    torch.testing.assert_close(dense.mean(1), logits.mean(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dense.logsumexp(1), logits.logsumexp(1), rtol=0, atol=2e-3)


def test_rows_are_sliced_before_they_are_dense():
    logits = rows()
    form = TopK(16, 512)
    packed = Rows(form.pack(logits), form)
    assert len(packed) == 64 and torch.equal(packed[8:24][2:5].float(), packed.float()[10:13])


def test_log_probabilities_alone_serve_the_rules_that_need_no_logit():
    logits = rows()
    kept, ids = logits.log_softmax(1).topk(16)
    form = TopK(16, 512)
    dense = form.unpack(form.of_log_probs(ids, kept, "fixed"))
    torch.testing.assert_close(dense.softmax(1).gather(1, ids), kept.exp(), rtol=5e-3, atol=0)
    tail = dense.scatter(1, ids, 0.0)
    assert (tail.topk(17, 1).values[:, -1] <= 0).all() and (tail.ne(0).sum(1) == 512 - 16).all()
    for rule in ("max_logit", "centred", "std", "norm", "sharpness", "centred_sharpness", "erratum"):
        with pytest.raises(UserError, match=f"TEMPERATURE.RULE: {rule} needs whole rows of logits.*set fixed"):
            form.of_log_probs(ids, kept, rule)
    with pytest.raises(UserError, match="the 16 largest are needed; got 8"):
        form.of_log_probs(ids[:, :8], kept[:, :8], "fixed")
