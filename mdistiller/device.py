"""Which device, in which precision, from which seed."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import MethodType
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mdistiller.errors import UserError

Output = TypeVar("Output")
AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return the device `name`; for auto cuda, else mps, else cpu. Raises UserError if the machine lacks the device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"DEVICE: must be auto, cpu, cuda, cuda:N or mps; got '{name}'") from None
    present = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (device.index or 0) >= present.get(device.type, 0):
        raise UserError(f"DEVICE: this machine has no {name}; set DEVICE auto")
    return device


def check_amp(amp: str, device: torch.device) -> None:
    """Raise UserError for fp16 off CUDA."""
    if amp == "fp16" and device.type != "cuda":
        raise UserError(f"SOLVER.AMP: fp16 needs CUDA, and the device is {device.type}; set SOLVER.AMP bf16 or none")


def has_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 is arithmetic of the device's own. What emulates it can be ten times slower than
    float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # no public interface
    return known() if device.type == "cpu" and known else True


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    dtype = AMP_DTYPES[amp]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` in float32; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def prepare(model: nn.Module, device: torch.device) -> nn.Module:
    """Move `model` to the device, convolutions channels-last, and return it. Under autocast its logits come out in
    float32, so that every method's loss on them is computed in float32.
    """
    model.to(device=device, memory_format=torch.channels_last)
    model.register_forward_hook(logits_in_float32)
    for conv in model.modules():
        if device.type == "cpu" and type(conv) is nn.Conv2d and conv.groups == conv.in_channels > 1:
            conv.forward = MethodType(_depthwise, conv)
    return model


def unprepare(model: nn.Module) -> nn.Module:
    """Undo what `prepare` has done to `model`, but for its place: it returns what its author wrote. Return it."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "__func__", None) is _depthwise:
            del module.forward
        for key, hook in list(module._forward_hooks.items()):
            if hook is logits_in_float32:
                del module._forward_hooks[key]
    return model


def _depthwise(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Convolve in float32 where oneDNN's backward pass in bfloat16 is five to fifty times slower: strides, tiny
    images.
    """
    slow = max(conv.stride) > 1 or x.shape[-1] <= 2
    if not (slow and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
        return nn.Conv2d.forward(conv, x)
    with torch.autocast("cpu", enabled=False):
        return nn.Conv2d.forward(conv, x.float()).to(torch.get_autocast_dtype("cpu"))


def side_stream(device: torch.device) -> AbstractContextManager:
    """Return a context whose work runs beside that of other contexts, on a CUDA stream of its own, after all that came
    before; graphs are captured on such a stream only. Elsewhere nothing.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    torch.cuda.synchronize(device)
    return torch.cuda.stream(torch.cuda.Stream(device))


def captured(work: Callable[[], Output], pool: tuple[int, int] | None = None) -> tuple[torch.cuda.CUDAGraph, Output]:
    """Capture what `work` does on the current stream, which must not be the default one, as a CUDA graph. Return the
    graph and what `work` gave. `pool`: of a graph that never runs at the same time, whose memory this one may use.

    Raises RuntimeError where it cannot be captured, with the first reason, be that a lack of memory; everything else
    goes on as before. torch up to 2.11 leaves a capture that CUDA has broken off with an open pool of memory and with
    generators that go on counting for it: later numbers could not be drawn, nor graphs replayed.
    """
    graph, failed = torch.cuda.CUDAGraph(), []
    pool = pool or torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            try:
                return graph, work()
            except Exception as error:
                failed.append(error)  # the end of the capture raises another one, which says less
                raise
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # newer ones do both themselves, and refuse it
            graph.reset()
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        with contextlib.suppress(RuntimeError):  # a whole capture takes the generators out of the broken one
            number = torch.zeros((), device="cuda")
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()):
                number.add_(1)
        first = failed[0] if failed else error
        if isinstance(first, torch.OutOfMemoryError):  # one operation at a time needs less
            raise RuntimeError(str(first)) from None
        raise first from None


def logits_in_float32(_model: nn.Module, _inputs: tuple, output: torch.Tensor | tuple) -> tuple:
    """Return (logits in float32, feats): the hook of every model. One that returns logits alone has no feats,
    nor has one that in training gives a named tuple of `logits` and the outputs of auxiliary classifiers.
    """
    if isinstance(output, (list, dict)):  # a detector's boxes, or its losses
        return output
    output = getattr(output, "logits", output)
    if isinstance(output, torch.Tensor):
        return at_least_float32(output), {}
    return at_least_float32(output[0]), *output[1:]


def set_determinism(deterministic: bool) -> None:
    """Ask for the same bits from the same seed on the same machine. A CPU gives them anyway, for a given number of
    threads; on CUDA it takes slower kernels, and operations that have none raise RuntimeError.
    """
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports a compiler: seconds
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def torch_generators() -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the states of torch's generators: the host's and, where CUDA is in use, its current device's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def set_torch_generators(host: torch.Tensor, cuda: torch.Tensor | None) -> None:
    torch.set_rng_state(host)
    if cuda is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(cuda)


def generators() -> tuple:
    """Return every generator's state, to be given to `set_generators`."""
    return torch_generators(), np.random.get_state(), random.getstate()


def set_generators(state: tuple) -> None:
    of_torch, numpy, python = state
    set_torch_generators(*of_torch)
    np.random.set_state(numpy)
    random.setstate(python)


@contextlib.contextmanager
def callers_state() -> Iterator[None]:
    """Give back every generator, and what `set_determinism` sets, as they were before."""
    (host, _), *others = generators()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    deterministic = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        set_generators(((host, None), *others))
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_initialized():  # since then: its generators begin with the seed of the host's
            torch.cuda.manual_seed_all(torch.initial_seed())
        if deterministic != torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


class OwnGenerators:
    """The generators of one of several runs that take turns in this process, as they are when it is made. `take` makes
    them the process's, and keeps for the run that had it until then what that has come to.
    """

    holder: "OwnGenerators | None" = None  # whose generators the process has

    def __init__(self):
        self.states = generators()

    def take(self) -> None:
        before = OwnGenerators.holder
        if before is self:
            return
        if before is not None:
            before.states = generators()
        set_generators(self.states)
        OwnGenerators.holder = self


def rng_state() -> dict:
    """Return `generators` in types that a weights-only load accepts."""
    (host, cuda), (kind, keys, position, has_gauss, gauss), (version, internal, gauss_next) = generators()
    return {
        "torch": host,
        "cuda": [] if cuda is None else [cuda],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(internal), gauss_next],
    }


def set_rng_state(state: dict) -> None:
    cuda = None
    if state["cuda"] and torch.cuda.is_initialized():
        own = min(torch.cuda.current_device(), len(state["cuda"]) - 1)  # older checkpoints: of every device
        cuda = state["cuda"][own].cpu()
    kind, keys, *position = state["numpy"]
    version, internal, gauss_next = state["python"]
    internal = internal.tolist() if isinstance(internal, torch.Tensor) else internal  # older checkpoints: a list
    numpy = (kind, keys.cpu().numpy().astype(np.uint32), *position)
    set_generators(((state["torch"].cpu(), cuda), numpy, (version, tuple(internal), gauss_next)))


class _OnDevice(TorchFunctionMode):
    """Lets `.cuda()`, `.to("cuda")` and device="cuda" mean `device`."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0].to(self.device)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = self.device
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], self.device, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def without_cuda(device: str | torch.device) -> AbstractContextManager:
    """Return the context in which code that says "cuda" runs on `device`; nothing where that is CUDA. Of DEVICE's text
    "auto" and "mps" mean the CPU, where networks are before a method is moved.
    """
    kind = str(device).split(":")[0]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        return contextlib.nullcontext()
    return _OnDevice(device if isinstance(device, torch.device) else torch.device("cpu"))
