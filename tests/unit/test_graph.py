"""Captured steps: a graph replays what the step does. With a stand-in for CUDA's graphs, and on a GPU with them."""

import random
import warnings
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, DRAWING, METHODS, Recording, cases, gpu, make_trainer, train_steps

from mdistiller.device import side_stream
from mdistiller.distillers.KD import KD
from mdistiller.engine import graph
from mdistiller.engine.graph import WARM_UP
from mdistiller.errors import UserError


def make(method, device=CPU, capture=Recording, samples=24, **given):
    """A trainer whose steps are graphs, unless `capture` is None; its batches have 16 and 8 images."""
    capture = graph.cuda_graph if capture and device != CPU else capture
    return make_trainer(method, None, device, samples=samples, capture=capture, **given)


@pytest.mark.parametrize("method", ["NONE", "DTKD", "CTKD", "VID", "OFD"])
def test_replaying_is_stepping(method):
    """Everything that a step reads or writes lies where a graph finds it: the same weights and record, bit for bit but
    for the epoch's rounding, over epochs, batches of two sizes, a falling rate and a rising weight.
    """
    Recording.made = 0
    replayed, eager = make(method), make(method, capture=None)
    assert train_steps(replayed, 4)[0] == pytest.approx(train_steps(eager, 4)[0], rel=1e-4)
    assert Recording.made == 2, "one graph for each batch size"
    states = eager.distiller.state_dict(), replayed.distiller.state_dict()
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    if eager.buffer is not None:
        values = eager.buffer.values, replayed.buffer.values
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4, equal_nan=True)


def keeping(start, change):
    """A method that holds `start()` as `own`; at each step `change(method)` gives a factor of its losses."""

    class Keeping(KD):
        def __init__(self, *given):
            super().__init__(*given)
            own = start()
            self.register_buffer("own", own) if isinstance(own, torch.Tensor) else setattr(self, "own", own)

        def losses(self, *given, **more):
            factor = change(self)
            return {name: value * factor for name, value in super().losses(*given, **more).items()}

    return Keeping


def raised(holder, name, by=1):
    """Raise the attribute `name` of `holder`. Return what it is then."""
    setattr(holder, name, getattr(holder, name) + by)
    return getattr(holder, name)


class NeedsANumber(KD):
    def losses(self, *args, epoch, **kwargs):
        if not isinstance(epoch, int):
            raise TypeError("an epoch is a number")
        return super().losses(*args, epoch=epoch, **kwargs)


def fails(work, beside):
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


NOTHING, HOST, STATE = type(None), "random numbers on the host", "replaces own's state"
REFUSED = {
    "counter": (keeping(int, lambda m: raised(m, "own")), "replaces own"),
    "object": (keeping(lambda: SimpleNamespace(n=0), lambda m: raised(m.own, "n")), "replaces own.n"),
    "container": (keeping(lambda: {"a": deque([0])}, lambda m: (m.own["a"].append(1), 2)[1]), "own['a']'s length"),
    "set": (keeping(set, lambda m: (m.own.add(len(m.own)), 2)[1]), "replaces own's length"),
    "array in an object in a dict": (
        keeping(lambda: {"a": SimpleNamespace(v=np.zeros(2))}, lambda m: float(raised(m.own["a"], "v")[0])),
        "replaces own['a'].v",
    ),
    "buffer": (keeping(lambda: torch.ones(()), lambda m: raised(m, "own", 0.5)), "replaces own"),
    "own python": (keeping(lambda: random.Random(0), lambda m: m.own.random()), STATE),
    "own numpy": (keeping(lambda: np.random.default_rng(0), lambda m: m.own.random()), STATE),
    "own torch": (
        keeping(lambda: torch.Generator().manual_seed(0), lambda m: torch.rand((), generator=m.own)),
        STATE,
    ),
    "numpy": (keeping(NOTHING, lambda m: np.random.rand()), HOST),
    "python": (keeping(NOTHING, lambda m: random.random()), HOST),
    "torch": (keeping(NOTHING, lambda m: torch.rand(())), HOST),
    "number": (NeedsANumber, "an epoch is a number"),
    "capture": (KD, "not permitted when stream is capturing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_would_not_repeat_is_found_and_stepped(case):
    """And where a step fails in a graph's way alone, it runs again as if nothing had been."""
    plugin, reason = REFUSED[case]
    results = []
    for capture in (fails if case == "capture" else Recording, None):
        made = make("KD", capture=capture, plugin=plugin, samples=8, ahead=False)
        for seed in (np.random.seed, random.seed, torch.manual_seed):
            seed(0)
        results.append((*train_steps(made, WARM_UP + 1), made.distiller.student.state_dict()))
    (losses, lines, weights), (expected, _, eager) = results
    assert len(lines) == 1 and reason in lines[0]
    assert losses == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(weights, eager, rtol=1e-4, atol=1e-5)


def test_a_mistake_of_the_method_is_not_hidden():
    def wrong(method):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(UserError, match="Keeping fails at .*test_graph.py:.* RuntimeError: shapes do not fit"):
        train_steps(make("KD", plugin=keeping(int, wrong)), 1)


@pytest.mark.filterwarnings("ignore")
def test_torchs_own_remark_about_waits_is_no_wait():
    """What it says once, when the mode that finds waits is switched on."""
    said = []
    for text in ("Synchronization debug mode is a prototype feature ... synchronizing", "called a synchronizing CUDA"):
        plugin = keeping(int, lambda method, text=text: warnings.warn(text, stacklevel=1) or 1)
        said.append(" ".join(train_steps(make("KD", plugin=plugin, samples=16), WARM_UP)[1]))
    assert not said[0] and "waits for the device" in said[1]


@pytest.mark.parametrize(("policy", "device"), cases(["skip"], ("skip",)))
def test_replayed_steps_are_left_out_where_they_are_bad(policy, device):
    class Bad(KD):
        """Not finite in the fifth epoch."""

        def losses(self, *args, epoch, **kwargs):
            factor = torch.where(torch.as_tensor(epoch) == 5, torch.inf, 1.0)
            return {name: value * factor for name, value in super().losses(*args, epoch=epoch, **kwargs).items()}

    device = torch.device(device)
    made = make("KD", device, plugin=Bad, policy=policy)
    with side_stream(device):
        assert not train_steps(made, 4)[1]
        before = {key: value.clone() for key, value in made.distiller.student.state_dict().items()}
        made.state.start_epoch()
        for plan, logits in made.feed.plans(5, 0, lambda: None):
            made.run_step(plan, logits, 5)
    assert made.step.meter.read()["skipped"] == 2
    torch.testing.assert_close(made.distiller.student.state_dict(), before, rtol=0, atol=0)


@gpu
@pytest.mark.parametrize(("method", "amp"), [(m, amp) for m in METHODS for amp in ("none", "bf16")] + [("dot", "none")])
def test_fifty_steps_of_a_graph_are_fifty_steps(method, amp):
    """The losses, within rounding, which grows from step to step as much as that of two eager runs does; those of
    methods that draw on the device in their scale alone.
    """
    device, results = torch.device("cuda"), []
    for capture in (None, None, Recording):
        with side_stream(device):
            given = {"samples": 40, "amp": amp, "dot": method == "dot"}
            made = make("KD" if method == "dot" else method, device, capture, **given)
            losses, lines = train_steps(made, 17)
        assert not lines or method == "KDSVD", lines
        results.append(losses)
    eager, again, replayed = map(np.array, results)
    grown = np.maximum.accumulate(np.abs(eager - again) / np.abs(eager))
    tolerance = (0.1 if amp == "bf16" or method in DRAWING else 2e-2) + 5 * grown
    assert (np.abs(replayed - eager) <= tolerance * np.abs(eager)).all()


@gpu
def test_a_wait_for_the_device_is_found():
    plugin = keeping(int, lambda method: 1 + 0 * float(next(method.student.parameters()).sum()))
    with side_stream(torch.device("cuda")):
        assert "waits for the device" in train_steps(make("KD", torch.device("cuda"), plugin=plugin), 3)[1][0]
