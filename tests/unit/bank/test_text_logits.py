"""A teacher's packed logits on blocks of text, with a bank and without: the same words, however the bank came to be."""

import pytest
import torch

from mdistiller.bank.segments import Segments
from mdistiller.bank.teacher import Bank
from mdistiller.bank.text import TextLogits, TextTeacher
from mdistiller.bank.topk import TopK
from mdistiller.dataset import TokenBatches, token_set
from mdistiller.errors import UserError
from mdistiller.models import build_model

V, S = 64, 16


def network(seed=0):
    torch.manual_seed(seed)
    return build_model("gpt1x32", V, "text")


def batches(size=4, seed=0):
    stream = torch.randint(0, V, (12 * S + 1,), generator=torch.Generator().manual_seed(0))
    data = token_set(stream, stream, S, V, "digest")
    return TokenBatches(data.train_images, data.train_labels, size, seed, shuffle=True)


def logits_of(folder=None, model=None, k=8, dtype=torch.float16, data=None):
    form, data = TopK(k, V, dtype), data or batches()
    logits = TextLogits(data, TextTeacher(model or network(), form, "none"))
    if folder:
        logits.bank = Bank(Segments(folder, {"teacher": "gpt1x32"}, data.num_samples, logits.width, logits.dtype))
    return logits


def test_they_are_the_teachers_own_in_the_form_that_is_kept():
    model, data = network(), batches()
    plan = data.plan(1)[:, :5]
    found = logits_of(model=model, k=V, dtype=torch.float32)(plan)
    with torch.no_grad():
        own = torch.cat([model.eval()(data.batch(plan[:, [i]]).image)[0] for i in range(5)])
    assert len(found) == 5 * S and torch.equal(found.float(), own), "whole rows in float32: to the bit"
    few = logits_of(model=model)(plan)
    assert torch.equal(few.words, TopK(8, V).pack(own))
    assert torch.equal(few[S : 2 * S].float(), few.float()[S : 2 * S])


@pytest.mark.parametrize("k", [8, V])
def test_a_bank_changes_no_word_in_any_order(tmp_path, k):
    plan, model = batches().plan(1), network()
    expected = logits_of(model=model, k=k)(plan).words
    lazy = logits_of(tmp_path / "lazy", model, k)
    lazy(batches(seed=5).plan(3)[:, :4])
    assert torch.equal(lazy(plan).words, expected), "some blocks are held, or none"
    lazy.bank.commit()
    warm = logits_of(tmp_path / "lazy", model, k)
    warm.compare()
    warm.inference = None  # it is asked no more
    assert warm.complete and torch.equal(warm(plan).words, expected)
    full = logits_of(tmp_path / "full", model, k)
    full.bank.fill_first = True
    full.prepare(lambda: None)
    assert torch.equal(full(plan).words, expected)


def test_larger_passes_pad_what_is_left():
    plan, model = batches().plan(1), network()
    logits, expected = logits_of(model=model), logits_of(model=model)(plan).float()
    logits.chunk = 5
    torch.testing.assert_close(logits(plan).float(), expected, rtol=0, atol=0.02)


def test_another_teachers_bank_is_refused(tmp_path):
    logits = logits_of(tmp_path)
    logits(batches().plan(1))
    logits.bank.commit()
    logits_of(tmp_path).compare()
    other = network(1)
    with torch.no_grad():
        other.head.weight.mul_(20)
    with pytest.raises(UserError, match="holds other logits than this teacher gives"):
        logits_of(tmp_path, other).compare()


def test_a_teacher_in_training_mode_stays_in_it():
    model = network().train()
    logits_of(model=model)(batches().plan(1))
    assert model.training
