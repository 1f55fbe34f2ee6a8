"""A training step as a CUDA graph: recorded once, then started by one call, whatever Python would have cost."""

import contextlib
import pickle
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller.device import captured, generators, set_generators
from mdistiller.errors import UserError

WARM_UP = 3  # steps of each batch size that run one operation at a time, so that every library has made its choices


def cuda_graph(work: Callable[[], None], beside: torch.cuda.CUDAGraph | None = None) -> torch.cuda.CUDAGraph:
    """Return what `work` does on the device, to be done again by `replay()`. Raises RuntimeError where it cannot be
    recorded. `beside`: a graph that never runs at the same time, whose memory this one may use.
    """
    return captured(work, beside.pool() if beside else None)[0]


class GraphStep:
    """Calls `work(plan, logits, epoch)`, from the fourth time on as a graph, one for each batch size.

    `plan` (4, B), `logits` (B, K) or None and `epoch` are put where the graph reads them, the epoch as a 0-dim tensor;
    everything else that `work` reads or writes has to stay where it is. What a replay would not repeat is found out
    beforehand: a wait for the device, random numbers drawn on the host, a tensor, number or generator of `module` that
    changes. Then `refusal` says so, and `work` runs as it is, the epoch a number. `exclusive`: whether no other graph
    runs at the same time; all graphs read the device's generator from one place.
    """

    def __init__(
        self,
        work: Callable[[Tensor, Tensor | None, int | Tensor], None],
        module: nn.Module,
        device: torch.device,
        exclusive: bool = True,
        capture: Callable = cuda_graph,
    ):
        self.exclusive = exclusive
        self.work, self.module, self.capture = work, module, capture
        self.refusal = ""
        self.epoch = torch.zeros((), device=device)
        self.calls: dict[int, int] = {}
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor | None]] = {}

    def __call__(self, plan: Tensor, logits: Tensor | None, epoch: int) -> None:
        if self.refusal:
            self.work(plan, logits, epoch)
            return
        self.epoch.fill_(epoch)
        size = plan.shape[1]
        self.calls[size] = self.calls.get(size, 0) + 1
        before = None if size in self.graphs else ([(b, b.clone()) for b in self.module.buffers()], generators())
        try:
            if self.calls[size] < WARM_UP:
                self.work(plan, logits, self.epoch)
            elif self.calls[size] == WARM_UP:
                self.refusal = self._watch(plan, logits)
            else:
                if size not in self.graphs:
                    self._record(plan, logits)
                self._replay(plan, logits)
        except Exception as error:
            if isinstance(error, (UserError, torch.OutOfMemoryError)) or size in self.graphs:
                raise
            # the step has not come to its update: it may run again, and a mistake that is no graph's comes again
            for buffer, value in before[0]:
                buffer.copy_(value)
            set_generators(before[1])
            self.refusal = " ".join(str(error).split())[:200] or type(error).__name__
            self.work(plan, logits, epoch)

    def _record(self, plan: Tensor, logits: Tensor | None) -> None:
        """Record the step. Recording runs nothing: what the step would do is done by the replay that follows."""
        held, given = plan.clone(), None if logits is None else logits.clone()
        beside = next((graph for graph, *_ in self.graphs.values()), None)
        self.graphs[plan.shape[1]] = self.capture(lambda: self.work(held, given, self.epoch), beside), held, given

    def _replay(self, plan: Tensor, logits: Tensor | None) -> None:
        graph, held, given = self.graphs[plan.shape[1]]
        held.copy_(plan)
        if given is not None:
            given.copy_(logits)
        graph.replay()

    def _watch(self, plan: Tensor, logits: Tensor | None) -> str:
        """Run the step; returns what a replay of it would miss, empty if nothing."""
        state, drawn, on_device = self._state(), host_generators(), device_generator()
        with warnings.catch_warnings(record=True) as caught, waits_are_warnings():
            warnings.simplefilter("always")
            self.work(plan, logits, self.epoch)
        waits = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
        if waits:
            return f"it waits for the device ({waits[0].splitlines()[0]})"
        if drawn != host_generators():
            return "it draws random numbers on the host"
        if not self.exclusive and on_device != device_generator():
            return "it draws random numbers on the device, beside other graphs"
        changed = [name for name, value in self._state().items() if state.get(name) != value]
        return f"it replaces {changed[0]}, which a graph would not" if changed else ""

    def _state(self) -> dict[str, object]:
        """Return by name the identity of every tensor and the value of every number and generator that the modules
        hold, in containers and plain objects too.
        """
        held: dict[str, object] = {}
        seen: set[int] = set()

        def look(name: str, value: object, depth: int) -> None:
            if isinstance(value, Tensor):
                held[name] = id(value), value.data_ptr()
            elif isinstance(value, (bool, int, float, str)):
                held[name] = value
            elif isinstance(value, GENERATORS):
                held[f"{name}'s state"] = pickle.dumps(value)
            elif isinstance(value, (np.ndarray, np.generic)):
                held[name] = value.tobytes()
            elif depth < 3 and id(value) not in seen:
                seen.add(id(value))
                items = parts_of(value)
                held[f"{name}'s length"] = len(items)
                for key, item in items:
                    look(f"{name}{key}", item, depth + 1)

        for path, module in self.module.named_modules():
            for name, value in {**module.__dict__, **module._buffers, **module._parameters}.items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    look(f"{path}.{name}".lstrip("."), value, 0)
        return held


GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
OPAQUE = (nn.Module, type, ModuleType, FunctionType, MethodType)  # or looked at by themselves


def parts_of(value: object) -> list[tuple[str, object]]:
    """Return what a container or a plain object holds, each with what is written behind the name of `value` for it."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque, set, frozenset)):
        return [(f"[{number}]", item) for number, item in enumerate(value)]
    own = {} if isinstance(value, OPAQUE) else getattr(value, "__dict__", {})
    return [(f".{key}", item) for key, item in own.items()]


def host_generators() -> bytes:
    """Return what changes where a random number is drawn on the host."""
    return pickle.dumps((torch.get_rng_state().numpy(), np.random.get_state(), random.getstate()))


def device_generator() -> bytes:
    return torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else b""


@contextlib.contextmanager
def waits_are_warnings() -> Iterator[None]:
    """Let torch warn of whatever waits for a CUDA device."""
    if not torch.cuda.is_initialized():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
