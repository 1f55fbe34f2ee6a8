"""Rows of logits of which the k largest are kept: what rules and divergences see of them, and whole rows."""

import pytest
import torch

from mdistiller import losses as L
from mdistiller.bank.topk import TopK
from mdistiller.errors import RunFailed, UserError

V = 600


def rows(n: int = 200, scale: float = 2.0, shift: float = -7.0) -> torch.Tensor:
    """Heavy-tailed rows with a raised entry, far from 0 as a language model's are."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(n, V, generator=generator) + shift
    logits[torch.arange(n), torch.randint(0, V, (n,), generator=generator)] += 8
    return logits


def form(k: int, dtype: torch.dtype = torch.float16) -> TopK:
    return TopK(k, torch.arange(V, 0, -1), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("k", [0, V, 10 * V])
def test_whole_rows_are_the_teachers_own(dtype, k):
    """In float32 to the bit; in float16 each distance from the row's largest logit is rounded."""
    logits, packed = rows(), form(k, dtype)
    found = packed.unpack(packed.pack(logits))
    if dtype == torch.float32:
        assert torch.equal(found, logits)
    assert (found - logits).abs().max() <= 2**-11 * 30
    assert packed.pack(logits).dtype == torch.int16


@pytest.mark.parametrize("k", [8, 64])
@pytest.mark.parametrize("rule", ["fixed", "max_logit", "centred", "std", "norm", "centred_sharpness"])
def test_temperatures_are_those_of_the_whole_row(rule, k):
    shift = 20.0 if rule == "max_logit" else -7.0  # it is defined for positive maxima
    teacher, student = rows(shift=shift), rows(scale=1.0, shift=shift).roll(1, 0)
    packed = form(k)
    kept = packed.unpack(packed.pack(teacher))
    whole, found = (getattr(L, rule)(student, u, 1.0) for u in (teacher, kept))
    assert torch.equal(whole.sound, found.sound)
    allowed = 0.03 if rule == "centred_sharpness" else 1e-3
    assert torch.allclose(found.teacher, whole.teacher, rtol=allowed)
    assert torch.allclose(found.student, whole.student, rtol=allowed)


def test_the_kept_entries_have_their_probabilities():
    teacher, packed = rows(), form(64)
    kept = packed.unpack(packed.pack(teacher))
    places = teacher.topk(64, 1).indices
    p, q = teacher.softmax(1).gather(1, places), kept.softmax(1).gather(1, places)
    assert torch.allclose(p, q, atol=1e-3)
    assert torch.equal(teacher.argmax(1), kept.argmax(1))
    assert (kept.max(1).values == teacher.max(1).values).all()


def test_a_vocabulary_beyond_16_bits():
    logits = torch.randn(3, 70_000, generator=torch.Generator().manual_seed(0))
    packed = TopK(5, torch.ones(70_000))
    assert packed.width == 5 * 3 + 4 + 8
    places = logits.topk(5, 1).indices
    found = packed.unpack(packed.pack(logits))
    assert torch.allclose(found.gather(1, places), logits.gather(1, places), atol=5e-3)


def test_a_constant_row_and_no_row():
    packed = form(8)
    assert packed.unpack(packed.pack(torch.zeros(0, V))).shape == (0, V)
    assert torch.allclose(packed.unpack(packed.pack(torch.full((2, V), 3.0))), torch.full((2, V), 3.0), atol=1e-3)


def test_logits_that_are_too_far_apart_are_refused():
    logits = rows(2)
    logits[0, :400] -= 1e6
    with pytest.raises(RunFailed, match="set TEACHER_BANK_DTYPE float32"):
        form(0).pack(logits)


def test_log_probabilities_serve_the_rules_that_need_no_logit():
    logp, packed = rows().log_softmax(1), form(16)
    best, ids = logp.topk(16, 1)
    found = packed.unpack(packed.of_log_probs(ids, best, "fixed"))
    assert torch.allclose(found.logsumexp(1), torch.zeros(len(logp)), atol=2e-3)
    assert torch.allclose(found.gather(1, ids), best, atol=1e-2)
    assert not L.max_logit(rows(), found, 1.0).sound.any()
    with pytest.raises(UserError, match="TEMPERATURE.RULE: centred needs whole rows of logits"):
        packed.of_log_probs(ids, best, "centred")
