"""A model made for inference alone: traced, its BatchNorms folded; with oneDNN's fused convolutions on a CPU, as one
captured graph on CUDA.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mdistiller.bank.onednn import PackedConv, can_fuse, fuse, module_of, mutates
from mdistiller.device import AMP_DTYPES, autocast, captured, logits_in_float32
from mdistiller.models import give_features, in_eval_mode


class Inference:
    """`model` for inference alone: images (B, 3, H, W) -> logits (B, K) in float32, in eval mode, without gradients.

    It has the weights that the model has when it is made, and leaves the model as it is. In oneDNN's form, for finite
    images in a batch of one shape, a row's logits do not depend on the other rows or on its place, to the bit. A model
    that torch.fx cannot trace, or whose trace gives other logits on random images of `size` pixels, runs as it is; so
    does one with hooks. `captured`: on CUDA one graph serves all calls with images of the first call's shape, which
    pays for many calls.

    `folded`: BatchNorms that are part of a convolution now; `fused`: convolutions that run in oneDNN's fused form.
    """

    def __init__(self, model: nn.Module, device: torch.device, amp: str, size: int = 32, captured: bool = False):
        self.model, self.device, self.amp = model, device, amp
        self.folded = self.fused = 0
        self._graph: Callable[[Tensor], Tensor] | None = None
        self._fast: nn.Module | None = None
        # the model, a trace or the image below may draw random numbers
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            if not _has_hooks(model):
                self._build(torch.randn(4, 3, size, size).to(device, memory_format=torch.channels_last))
        if self._graph and captured and device.type == "cuda":
            self._graph = CapturedFunction(self._graph)

    def _build(self, image: Tensor) -> None:
        try:
            # a trace leaves its proxies in a module that keeps what it computes: a copy is traced, not the model
            plain = give_features(copy.deepcopy(self.model).eval(), False)
            exact, rounded = self._call(plain, "none")(image), self._call(plain, self.amp)(image)
            # a sound graph's error is that of its roundings, which folding only moves; CUDA convolves in TF32
            rounding = 2e-4 if self.device.type == "cpu" else 1e-2
            allowed = 5 * (rounded - exact).abs().max() + rounding * exact.abs().max()
            folded, count = fold(plain)
            graph = self._call(folded, self.amp)
            if (graph(image) - exact).abs().max() <= allowed:  # not so where a weight is not finite
                self._graph, self.folded = graph, count
        except Exception:  # whatever a plug-in's forward() does on seeing a proxy
            return
        if self._graph and self.device.type == "cpu" and can_fuse(self.amp):
            with contextlib.suppress(Exception):  # operators that promise nothing
                module = fuse(folded, AMP_DTYPES[self.amp] or torch.float32)
                fast = self._call(module, self.amp)
                if (fast(image) - exact).abs().max() <= allowed:
                    self._fast = fast
                    self.fused = sum(isinstance(part, PackedConv) for part in module.modules())

    def _call(self, module: nn.Module, amp: str) -> Callable[[Tensor], Tensor]:
        """Return a function from images to the logits of `module` in that precision."""

        def call(image: Tensor) -> Tensor:
            with autocast(self.device, amp):
                output = module(image)
            return (output if isinstance(output, Tensor) else output[0]).float()

        return call

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)
        # oneDNN's ReLU makes 0 of NaN, which would hide that an image is broken (and does hide it where finite ones
        # overflow)
        if self._fast and image.sum().isfinite():
            return self._fast(image)
        if self._graph:
            return self._graph(image)
        with in_eval_mode(self.model):
            return self._call(self.model, self.amp)(image)


def fold(plain: nn.Module) -> tuple[fx.GraphModule, int]:
    """Return the trace of `plain`, which gives logits alone, and how many BatchNorms are part of a convolution in it.

    `plain` is in eval mode, and nobody else uses it. Raises whatever the trace raises.
    """
    module = fx.symbolic_trace(plain).requires_grad_(False)
    graph, folded = module.graph, 0
    output = next(node for node in graph.nodes if node.op == "output")
    if isinstance(output.args[0], (tuple, list)):  # (logits, feats)
        output.args = (output.args[0][0],)
    for node in reversed(list(graph.nodes)):  # fx's own removal takes what works in place for unused
        if not node.users and node.op not in ("placeholder", "output") and not mutates(node):
            graph.erase_node(node)
    uses = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        norm, before = module_of(node), node.args[0] if node.args else None
        if type(norm) is nn.BatchNorm2d and norm.running_mean is not None and isinstance(before, fx.Node):
            alone = len(before.users) == uses[node.target] == uses[before.target] == 1
            if alone and type(module_of(before)) is nn.Conv2d:
                module.set_submodule(before.target, fuse_conv_bn_eval(module_of(before), norm))
                node.replace_all_uses_with(before)
                graph.erase_node(node)
                folded += 1
    module.delete_all_unused_submodules()
    module.recompile()
    return module, folded


def _has_hooks(model: nn.Module) -> bool:
    """Return whether a forward pass calls hooks, but for the one that `prepare` leaves on every model."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    hooks += [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return any(hook is not logits_in_float32 for hook in hooks)


class CapturedFunction:
    """`function`, a tensor -> a tensor, captured for the first shape that it is called with and replayed for that
    shape; called as it is for any other, and for every shape if it cannot be captured.

    `capture`: (function, static input) -> (static output, what computes it anew).
    """

    def __init__(self, function: Callable[[Tensor], Tensor], capture: Callable | None = None):
        self.function, self.capture = function, capture or _capture_cuda_graph
        self.input: Tensor | None = None
        self.replay: Callable | None = None

    def __call__(self, image: Tensor) -> Tensor:
        if self.input is None:
            self.input = image.clone()
            # it stays eager where memory is short or an operation cannot be captured
            with contextlib.suppress(RuntimeError):
                self.output, self.replay = self.capture(self.function, self.input)
        if self.replay is None or image.shape != self.input.shape or image.dtype != self.input.dtype:
            return self.function(image)
        self.input.copy_(image)
        self.replay()
        return self.output.clone()


def _capture_cuda_graph(function: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, Callable]:
    with torch.cuda.device(image.device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # its own: graphs captured on one stream share cuBLAS's workspace
            for _ in range(3):  # cuDNN chooses its kernels and takes its workspaces, which a capture must not
                function(image)
            graph, output = captured(lambda: function(image))
        here.wait_stream(aside)
    return output, graph.replay
