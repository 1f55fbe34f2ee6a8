"""CUDA's generators and captures, with stand-ins for CUDA."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from helpers import forked, status_of

from mdistiller.bank.inference import CapturedFunction
from mdistiller.device import captured, rng_state, set_rng_state
from mdistiller.engine.graph import waits_are_warnings


def test_a_run_on_the_cpu_does_not_wake_cuda(monkeypatch):
    """Which a forked child of a process that uses it could not."""

    def initialise():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 1)
    for module in (torch.cuda, torch.cuda.random):
        monkeypatch.setattr(module, "_lazy_init", initialise)

    def child():
        with waits_are_warnings():
            state = rng_state()
        set_rng_state(state | {"cuda": [torch.zeros(16, dtype=torch.uint8)]})

    assert status_of(forked(child)) == 0


@pytest.mark.parametrize(("kept_of", "kept", "now", "expected"), [(1, 2, 0, 0), (4, 2, 2, 2), (4, 2, 5, 3)])
def test_the_devices_generator_goes_on_whatever_the_number_of_devices(monkeypatch, kept_of, kept, now, expected):
    """A checkpoint has that of the run's device; older ones, one of each of `kept_of` devices."""
    current, states = SimpleNamespace(device=kept), {n: torch.tensor([n], dtype=torch.uint8) for n in range(6)}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.device)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: states[current.device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: states.update({current.device: state}))
    state = rng_state()
    assert [int(kept) for kept in state["cuda"]] == [2]
    if kept_of > 1:
        state["cuda"] = [states[number].clone() for number in range(kept_of)]
    current.device = now
    set_rng_state(state)
    assert int(states[now]) == (2 if kept_of == 1 else expected)


class OldTorch:
    """CUDA's captures as torch up to 2.11 has them: what one that is broken off leaves open, and what then fails."""

    def __init__(self, monkeypatch):
        self.pools, self.handles, self.counting = [], 0, False
        for holder, name, stand_in in (
            (torch.cuda, "CUDAGraph", lambda: SimpleNamespace(reset=lambda: None)),
            (torch.cuda, "graph", self.capture),
            (torch.cuda, "graph_pool_handle", self.new_pool),
            (torch.cuda, "current_stream", lambda: None),
            (torch.cuda, "current_device", lambda: 0),
            (torch._C, "_cuda_endAllocateToPool", self.end),
            (torch._C, "_cuda_releasePool", lambda device, pool: None),
        ):
            monkeypatch.setattr(holder, name, stand_in, raising=False)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))

    def new_pool(self):
        self.handles += 1
        return 0, self.handles

    @contextlib.contextmanager
    def capture(self, graph, pool=None, stream=None):
        pool = pool or self.new_pool()
        self.pools.append(pool)
        self.counting = True
        try:
            yield
        except Exception:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        self.end(0, pool)
        self.counting = False

    def end(self, device, pool):
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    def draw(self):
        if self.counting:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


def short_of_memory(*given):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_after_a_capture_that_was_broken_off_all_goes_on(monkeypatch):
    """And the reason is the first one. A lack of memory is none that ends a run: eager steps need less."""
    cuda = OldTorch(monkeypatch)

    def waits():
        raise ValueError("operation not permitted when stream is capturing")

    for work, error, says in ((waits, ValueError, "not permitted"), (short_of_memory, RuntimeError, "out of memory")):
        with pytest.raises(error, match=says) as caught:
            captured(work)
        assert not isinstance(caught.value, torch.OutOfMemoryError)
        assert not cuda.pools
        cuda.draw()
    assert captured(lambda: 3)[1] == 3


def test_a_broken_capture_of_a_teacher_leaves_it_eager(monkeypatch):
    cuda = OldTorch(monkeypatch)
    function = CapturedFunction(lambda x: 2 * x, lambda function, image: captured(short_of_memory))
    for _ in range(2):
        assert function(torch.ones(2)).tolist() == [2, 2]
        cuda.draw()
