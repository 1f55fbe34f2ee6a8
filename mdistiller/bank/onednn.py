"""oneDNN's fused operators, which are no public interface of PyTorch: convolution, sum and ReLU in one."""

import copy
import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


def can_fuse(amp: str) -> bool:
    """Return whether this PyTorch has the operators, in that precision."""
    try:
        torch.ops.mkldnn._convolution_pointwise.binary  # noqa: B018
        torch.ops.mkldnn._convolution_pointwise_.binary  # noqa: B018
        torch.ops.mkldnn._linear_pointwise.default  # noqa: B018
        torch._C._nn.mkldnn_reorder_conv2d_weight  # noqa: B018
        present = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
        return present and (amp == "none" or (amp == "bf16" and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    except (AttributeError, RuntimeError):
        return False


class PackedConv(nn.Module):
    """`conv`, plus `other` (B, C, H, W) where it is given, then a ReLU where `relu`, as one operator in `dtype`."""

    def __init__(self, conv: nn.Conv2d, relu: bool, dtype: torch.dtype):
        super().__init__()
        self.conv, self.dtype = [conv], dtype  # in a list: the folded graph's module, not a part of this one
        self.unary = "relu" if relu else None
        self.in_place = False  # whether the sum replaces `other`
        self.form = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.shape: torch.Size | None = None  # of the images that the weight is packed for

    def _pack(self, shape: torch.Size) -> None:
        self.shape, conv = shape, self.conv[0]
        weight = conv.weight.to(self.dtype).to_mkldnn()
        self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *self.form, list(shape))
        self.bias = conv.bias.to(self.dtype) if conv.bias is not None else None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = x.to(self.dtype)
        if self.shape != x.shape:
            self._pack(x.shape)
        operate, weights = torch.ops.mkldnn._convolution_pointwise, (self.packed, self.bias, *self.form)
        if other is None:
            return operate(x, *weights, self.unary or "none", [], "")
        if self.in_place:
            operate = torch.ops.mkldnn._convolution_pointwise_
            return operate.binary(other, x, *weights, "add", 1.0, self.unary, [], "")
        return operate.binary(x, other.to(self.dtype), *weights, "add", 1.0, self.unary, [], "")


class PackedLinear(nn.Module):
    """`linear` in float32 whatever the autocast. (PyTorch's own product is another sum for a row in another place of a
    small batch when threads share it.)
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed, self.bias = linear.weight.to_mkldnn(), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.float(), self.packed, self.bias, "none", [], "")


def fuse(folded: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """Return the folded graph with the operators in place of convolution, + and ReLU, and of the classifier."""
    module = fx.GraphModule(folded, copy.deepcopy(folded.graph))
    graph = module.graph
    for number, node in enumerate(list(graph.nodes)):
        conv = module_of(node)
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        last, other = node, None
        add = _only_user(node, ADDS) if conv.groups == 1 else None  # oneDNN's sum is for whole convolutions
        if add is not None and len(add.args) == 2 and not add.kwargs:
            rest = [value for value in add.args if value is not node]
            # an `x += convolution` changes x, which others may read; and the convolution moves down to the sum, past
            # which nothing may have changed its input
            movable = rest and isinstance(rest[0], fx.Node) and (add.args[0] is node or not mutates(add))
            if movable and not any(map(mutates, _between(node, add))):
                last, other = add, rest[0]
        relu = _only_user(last, RELUS)
        name = f"_fused{number}"
        module.add_submodule(name, PackedConv(conv, relu is not None, dtype))
        with graph.inserting_before(last):
            new = graph.call_module(name, (node.args[0],) if other is None else (node.args[0], other))
        (relu or last).replace_all_uses_with(new)
        for old in dict.fromkeys((relu or last, last, node)):
            graph.erase_node(old)
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if isinstance(module_of(node), PackedConv) and len(node.args) == 2:
            module_of(node).in_place = _is_last_use(node, node.args[1], order)
    head = next(node for node in graph.nodes if node.op == "output").args[0]
    if type(module_of(head)) is nn.Linear:
        module.add_submodule("_fused_head", PackedLinear(module_of(head)))
        head.target = "_fused_head"
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def module_of(node: fx.Node) -> nn.Module | None:
    """Return the module that the node calls, None for anything but a call of a module."""
    return node.graph.owning_module.get_submodule(node.target) if node.op == "call_module" else None


def mutates(node: fx.Node) -> bool:
    """Return whether the node may change one of its arguments."""
    if node.op == "call_module":
        return getattr(module_of(node), "inplace", False)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    inplace = (name.endswith("_") and not name.endswith("__")) or name == "setitem"
    augmented = getattr(operator, name, None) is node.target and name.startswith("i") and name != "index"
    flagged = any(value is True for value in node.args) or node.kwargs.get("inplace") or "out" in node.kwargs
    return node.op in ("call_function", "call_method") and bool(inplace or augmented or flagged)


def _only_user(node: fx.Node, targets: tuple) -> fx.Node | None:
    """Return the one node that reads `node`, if it is one of `targets` or, among ReLUs, the module."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user.op == "output":
        return None
    found = type(module_of(user)) is nn.ReLU if user.op == "call_module" else user.target in targets
    return user if found and (user.op != "call_module" or targets is RELUS) else None


def _is_last_use(node: fx.Node, value: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Return whether nobody reads the memory of `value` after `node`: it is a convolution's own output, and what reads
    it before makes new tensors.
    """
    readers = [user for user in value.users if user is not node]
    fresh = all(isinstance(module_of(user), (PackedConv, nn.BatchNorm2d)) for user in readers)
    before = all(order[user] < order[node] for user in readers)
    return isinstance(module_of(value), PackedConv) and fresh and before and node.args[0] is not value


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next
