"""A model made for inference alone: traced, its BatchNorms folded; with oneDNN's fused convolutions on a CPU, as one
captured graph on CUDA.
"""

import contextlib
import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mdistiller.device import AMP_DTYPES, autocast, logits_in_float32

CONSTANTS = (bool, int, float, str, type(None))
ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


class Inference:
    """`model` for inference alone: images (B, 3, H, W) -> logits (B, K) in float32, in eval mode, without gradients.

    Built once, it holds weights of its own, those that the model had then or at the last `refresh`; the model is not
    touched. In oneDNN's form, for finite images in a batch of one shape, a row's logits do not depend on the other rows
    or on its place, to the bit. A model that torch.fx cannot trace, or whose trace gives other logits on random images
    of `size` pixels, runs as it is, with its weights of the moment; so does one with hooks.

    `folded`: BatchNorms that are part of a convolution now; `fused`: convolutions that run in oneDNN's fused form.
    """

    def __init__(self, model: nn.Module, device: torch.device, amp: str, size: int = 32):
        self.model, self.device, self.amp, self.size = model, device, amp, size
        self._build()

    def _build(self) -> None:
        self._made_from = _structure(self.model)
        self._graph: _Folded | None = None
        self._fast: nn.Module | None = None
        # a forward pass or a trace may draw numbers, and a constructor of the image below does
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), torch.no_grad():
            self._choose()
        self.folded = len(self._graph.pairs) if self._graph else 0
        self.fused = sum(isinstance(m, _PackedConv) for m in self._fast.modules()) if self._fast else 0
        self._captured = _Captured(self._run_graph) if self._graph and self.device.type == "cuda" else None

    def _choose(self) -> None:
        if _has_hooks(self.model):
            return
        image = torch.randn(4, 3, self.size, self.size).to(self.device, memory_format=torch.channels_last)
        try:
            # a trace leaves its proxies in a module that keeps what it computes: a copy is traced, not the model
            plain = copy.deepcopy(self.model).eval()
            with autocast(self.device, "none"):
                exact = plain(image)[0].float()
            with autocast(self.device, self.amp):
                rounded = plain(image)[0].float()
            # a sound graph's error is that of its roundings, which folding only moves; CUDA convolves in TF32
            rounding = 2e-4 if self.device.type == "cpu" else 1e-2
            allowed = 5 * (rounded - exact).abs().max() + rounding * exact.abs().max()
            graph = _Folded(plain)
            graph.load(self.model)
            if self._differs(graph.module, image, exact) <= allowed:
                self._graph = graph
        except Exception:  # whatever a plug-in's forward() does on seeing a proxy
            return
        if self._graph and self.device.type == "cpu" and _can_fuse(self.amp):
            with contextlib.suppress(Exception):  # operators that promise nothing
                fast = _fuse(graph.module, AMP_DTYPES[self.amp] or torch.float32)
                if self._differs(fast, image, exact) <= allowed:
                    self._fast, self._sound = fast, graph.is_finite()

    def _differs(self, module: nn.Module, image: Tensor, exact: Tensor) -> Tensor:
        with autocast(self.device, self.amp):
            return (module(image).float() - exact).abs().max()

    def refresh(self) -> None:
        """Take over the model's weights of now; a model whose parts or settings have changed is traced again."""
        if self._made_from != _structure(self.model):
            self._build()
        elif self._graph:
            with torch.no_grad():
                self._graph.load(self.model)
                if self._fast:
                    for module in self._fast.modules():
                        if isinstance(module, (_PackedConv, _PackedLinear)):
                            module.packed = None
                    self._sound = self._graph.is_finite()

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)
        if self._captured:
            return self._captured(image)
        if self._graph:
            # oneDNN's ReLU makes 0 of NaN, which would hide that weights or an image are broken (and does hide it where
            # finite ones overflow)
            if self._fast and self._sound and image.sum().isfinite():
                with autocast(self.device, self.amp):
                    return self._fast(image).float()
            return self._run_graph(image)
        with _in_eval_mode(self.model), autocast(self.device, self.amp):
            return self.model(image)[0].float()

    def _run_graph(self, image: Tensor) -> Tensor:
        with autocast(self.device, self.amp):
            return self._graph.module(image).float()


class _Folded:
    """The trace of `plain`, a model in eval mode that nobody else uses: logits alone, BatchNorms folded.

    Raises TypeError if the model returns something else than (logits, ...), and whatever the trace raises.
    """

    def __init__(self, plain: nn.Module):
        self.module = module = fx.symbolic_trace(plain).requires_grad_(False)
        graph = module.graph
        output = next(node for node in graph.nodes if node.op == "output")
        if not (isinstance(output.args[0], (tuple, list)) and isinstance(output.args[0][0], fx.Node)):
            raise TypeError("a model returns (logits, feats)")
        output.args = (output.args[0][0],)
        _remove_unused(module)
        uses = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self.pairs: dict[str, str] = {}  # convolution -> the BatchNorm behind it
        for node in list(graph.nodes):
            bn, conv = _module_of(node), node.args[0] if node.args else None
            if type(bn) is nn.BatchNorm2d and bn.running_mean is not None and isinstance(conv, fx.Node):
                alone = len(conv.users) == 1 and uses[node.target] == 1 and uses[conv.target] == 1
                if alone and type(_module_of(conv)) is nn.Conv2d:
                    self.pairs[conv.target] = node.target
                    node.replace_all_uses_with(conv)
                    graph.erase_node(node)
        for name in self.pairs:
            conv = module.get_submodule(name)
            if conv.bias is None:
                conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=False)
        module.delete_all_unused_submodules()
        module.recompile()
        folded = tuple(f"{name}." for name in self.pairs)
        self.copied = {name: value for name, value in _tensors(module) if not name.startswith(folded)}

    def load(self, model: nn.Module) -> None:
        """Take the weights of `model`, in place: a captured CUDA graph reads them where they are."""
        source = dict(_tensors(model))
        for name, value in self.copied.items():
            if name in source:  # else a constant of the trace
                value.copy_(source[name])
        for name, bn_name in self.pairs.items():
            conv, bn = model.get_submodule(name), model.get_submodule(bn_name)
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
            target = self.module.get_submodule(name)
            target.weight.copy_(weight)
            target.bias.copy_(bias)

    def is_finite(self) -> bool:
        sums = [value.sum() for _, value in _tensors(self.module) if value.is_floating_point()]
        return bool(torch.stack(sums).sum().isfinite())


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _structure(model: nn.Module) -> list:
    """What a trace takes as constant, numbers, strings, tuples of them and tensors that are no buffers: equal for two
    states of a model whose weights alone differ.
    """
    parts: list = []
    for name, module in model.named_modules():
        parts.append((name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks)))
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                parts.append((key, id(value), 0 if value.is_inference() else value._version))
            elif key != "training" and all(type(v) in CONSTANTS for v in (value if type(value) is tuple else (value,))):
                parts.append((key, value))
    parts += [(name, value.shape, value.dtype, value.device) for name, value in _tensors(model)]
    return parts


def _has_hooks(model: nn.Module) -> bool:
    """Whether a forward pass calls hooks, but for the one that `prepare` leaves on every model."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    hooks += [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return any(hook is not logits_in_float32 for hook in hooks)


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _module_of(node: fx.Node) -> nn.Module | None:
    return node.graph.owning_module.get_submodule(node.target) if node.op == "call_module" else None


def _mutates(node: fx.Node) -> bool:
    """Whether the node may change one of its arguments."""
    if node.op == "call_module":
        return getattr(_module_of(node), "inplace", False)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    inplace = (name.endswith("_") and not name.endswith("__")) or name == "setitem"
    augmented = getattr(operator, name, None) is node.target and name.startswith("i") and name != "index"
    flagged = any(value is True for value in node.args) or node.kwargs.get("inplace") or "out" in node.kwargs
    return node.op in ("call_function", "call_method") and bool(inplace or augmented or flagged)


def _remove_unused(module: fx.GraphModule) -> None:
    """Nodes whose values nobody reads; fx's own removal takes what works in place for such a node."""
    for node in reversed(list(module.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not _mutates(node):
            module.graph.erase_node(node)


def _can_fuse(amp: str) -> bool:
    """Whether this PyTorch has oneDNN's fused operators, which are no public interface, in that precision."""
    try:
        torch.ops.mkldnn._convolution_pointwise.binary  # noqa: B018
        torch.ops.mkldnn._convolution_pointwise_.binary  # noqa: B018
        torch.ops.mkldnn._linear_pointwise.default  # noqa: B018
        torch._C._nn.mkldnn_reorder_conv2d_weight  # noqa: B018
        present = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
        return present and (amp == "none" or (amp == "bf16" and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    except (AttributeError, RuntimeError):
        return False


class _PackedConv(nn.Module):
    """`conv`, plus `other` (B, C, H, W) where it is given, then a ReLU where `relu`, as one operator in `dtype`."""

    def __init__(self, conv: nn.Conv2d, relu: bool, dtype: torch.dtype):
        super().__init__()
        self.conv, self.dtype = [conv], dtype  # in a list: the folded graph's module, not a part of this one
        self.unary = "relu" if relu else None
        self.in_place = False  # whether the sum replaces `other`
        self.form = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.packed: Tensor | None = None

    def _pack(self, shape: torch.Size) -> None:
        self.shape, conv = shape, self.conv[0]
        weight = conv.weight.to(self.dtype).to_mkldnn()
        self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *self.form, list(shape))
        self.bias = conv.bias.to(self.dtype) if conv.bias is not None else None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = x.to(self.dtype)
        if self.packed is None or self.shape != x.shape:
            self._pack(x.shape)
        operate, weights = torch.ops.mkldnn._convolution_pointwise, (self.packed, self.bias, *self.form)
        if other is None:
            return operate(x, *weights, self.unary or "none", [], "")
        if self.in_place:
            operate = torch.ops.mkldnn._convolution_pointwise_
            return operate.binary(other, x, *weights, "add", 1.0, self.unary, [], "")
        return operate.binary(x, other.to(self.dtype), *weights, "add", 1.0, self.unary, [], "")


class _PackedLinear(nn.Module):
    """`linear` in float32 whatever the autocast. (PyTorch's own product is another sum for a row in another place of a
    small batch when threads share it.)
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = [linear]
        self.packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        linear = self.linear[0]
        if self.packed is None:
            self.packed = linear.weight.to_mkldnn()
        return torch.ops.mkldnn._linear_pointwise(x.float(), self.packed, linear.bias, "none", [], "")


def _fuse(folded: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """The folded graph with oneDNN's operators in place of convolution, + and ReLU, and of the classifier. It reads
    the weights of `folded` when it packs them.
    """
    module = fx.GraphModule(folded, copy.deepcopy(folded.graph))
    graph = module.graph
    for number, node in enumerate(list(graph.nodes)):
        conv = _module_of(node)
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        last, other = node, None
        add = _only_user(node, ADDS) if conv.groups == 1 else None  # oneDNN's sum is for whole convolutions
        if add is not None and len(add.args) == 2 and not add.kwargs:
            rest = [value for value in add.args if value is not node]
            # an `x += convolution` changes x, which others may read; and the convolution moves down to the sum, past
            # which nothing may have changed its input
            movable = rest and isinstance(rest[0], fx.Node) and (add.args[0] is node or not _mutates(add))
            if movable and not any(map(_mutates, _between(node, add))):
                last, other = add, rest[0]
        relu = _only_user(last, RELUS)
        fused = _PackedConv(conv, relu is not None, dtype)
        name = f"_fused{number}"
        module.add_submodule(name, fused)
        with graph.inserting_before(last):
            new = graph.call_module(name, (node.args[0],) if other is None else (node.args[0], other))
        (relu or last).replace_all_uses_with(new)
        for old in dict.fromkeys((relu or last, last, node)):
            graph.erase_node(old)
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if isinstance(_module_of(node), _PackedConv) and len(node.args) == 2:
            _module_of(node).in_place = _is_last_use(node, node.args[1], order)
    head = next(node for node in graph.nodes if node.op == "output").args[0]
    if type(_module_of(head)) is nn.Linear:
        module.add_submodule("_fused_head", _PackedLinear(_module_of(head)))
        head.target = "_fused_head"
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _only_user(node: fx.Node, targets: tuple) -> fx.Node | None:
    """The one node that reads `node`, where it is one of `targets` or, among ReLUs, the module."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user.op == "output":
        return None
    found = type(_module_of(user)) is nn.ReLU if user.op == "call_module" else user.target in targets
    return user if found and (user.op != "call_module" or targets is RELUS) else None


def _is_last_use(node: fx.Node, value: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether nobody reads the memory of `value` after `node`: it is a convolution's own output, and what reads it
    before makes new tensors.
    """
    readers = [user for user in value.users if user is not node]
    fresh = all(isinstance(_module_of(user), (_PackedConv, nn.BatchNorm2d)) for user in readers)
    before = all(order[user] < order[node] for user in readers)
    return isinstance(_module_of(value), _PackedConv) and fresh and before and node.args[0] is not value


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


class _Captured:
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
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):  # its own: graphs captured on one stream share cuBLAS's workspace
            for _ in range(3):  # cuDNN chooses its kernels and takes its workspaces, which a capture must not
                function(image)
            with torch.cuda.graph(graph, stream=aside):
                output = function(image)
        here.wait_stream(aside)
    return output, graph.replay
