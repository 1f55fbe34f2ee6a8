"""What every method leaves in a checkpoint, without files; and that its step can be a graph."""

import copy

import pytest
import torch
from helpers import DRAWING, METHODS, make_trainer, same, train_steps

from mdistiller.engine.graph import WARM_UP
from mdistiller.engine.solver import set_lr


@pytest.mark.parametrize("method", METHODS)
def test_a_dump_holds_all_that_the_next_steps_depend_on(method):
    """Dumped inside an epoch and loaded into a fresh run of another seed, it is dumped again alike, and both runs go on
    bit for bit.
    """
    made, other = make_trainer(method, samples=24), make_trainer(method, samples=24, seed=7)
    train_steps(made, 1)
    plans = [made.feed.plan(1, number) for number in (0, 1)]
    kept = copy.deepcopy(made.state.dump())
    assert not any(key.startswith("teacher.") for key in kept["model"]) or method == "OFD"
    set_lr(other.step.optimizer, made.schedule.at(1))  # the loop sets both at the start of an epoch
    other.step.temperatures = other.buffer
    torch.rand(3)
    other.state.load(copy.deepcopy(kept), None)
    assert same(other.state.dump(), kept)
    ends = []
    for one in (made, other):
        one.state.load(copy.deepcopy(kept), None)
        for plan, logits in plans:
            one.run_step(plan, logits, 2)
        ends.append(one.state.dump())
    assert same(*ends)
    assert not same(ends[0]["model"], kept["model"])


@pytest.mark.parametrize("method", METHODS)
def test_a_step_can_be_a_graph_unless_it_draws_on_the_host(method):
    def capture(work, beside):
        raise AssertionError("the steps before it tell")

    made = make_trainer(method, samples=16, capture=capture)
    lines = train_steps(made, WARM_UP)[1]
    assert [("draws random numbers" in line) for line in lines] == ([True] if method in DRAWING else [])
