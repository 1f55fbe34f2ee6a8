"""A compiled step against an eager one; what chooses between them is in tests/unit/test_step.py."""

import copy
import os
import shutil

import pytest
import torch
from helpers import CPU, METHODS, make_trainer

from mdistiller import config
from mdistiller.engine.stepmode import compiled_form


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("method", METHODS if os.environ.get("COMPILE_ALL") else ["DTKD"])  # minutes in all
def test_a_compiled_step_has_the_gradients_of_an_eager_one(method):
    """The same draws, the same loss, the same gradients; in float64, where no rounding turns a ReLU. CRD is not
    compiled: its memories change on the way.
    """
    cfg = config.load(None, ["SOLVER.STEP", "compile", "DISTILLER.TYPE", method])
    made = make_trainer(method, samples=16)
    compiled, why = compiled_form(cfg, made.distiller, CPU, 1)
    if compiled is None:
        assert method in ("CRD", "OFD") and "which a compiled backward pass would read too late" in why
        return
    plan, logits = made.feed.plan(1, 0)
    batch, results = made.feed.batches.batch(plan), []
    exact = method != "MLKD"  # whose strong views are float32
    if exact:
        batch = batch._replace(image=batch.image.double())
        made.distiller.double()
    state = copy.deepcopy(made.distiller.state_dict())
    for forward in (made.distiller, compiled):
        made.distiller.load_state_dict(state)
        made.distiller.zero_grad()
        torch.manual_seed(3)
        given = {} if logits is None else {"logits_teacher": logits}
        _, losses = forward(**batch._asdict(), epoch=torch.full((), 3.0), **given)
        sum(losses.values()).backward()
        results.append((losses, [p.grad.clone() for p in made.step.parameters if p.grad is not None]))
    (eager, expected), (fast, gradients) = results
    torch.testing.assert_close(dict(fast), dict(eager), rtol=1e-5, atol=1e-6)
    nothing = 1e-6 * max(float(value.norm()) for value in expected)  # of a bias before a BatchNorm, but for rounding
    for own, value in zip(gradients, expected, strict=True):
        assert (own - value).norm() < (1e-5 if exact else 2e-2) * (value.norm() + nothing)
