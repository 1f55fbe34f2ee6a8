"""The processes of one run, as torchrun starts them: each trains on a part of every batch, rank 0 writes and speaks."""

import atexit
import contextlib
import functools
import os
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mdistiller.device import generators, resolve_device, set_generators
from mdistiller.errors import ProcessLost, RunFailed, UserError

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # rank 0 may fetch and decode a data set while the others wait
ROLL_CALL_SECONDS = 10.0  # in which those that are left say so; torchrun kills them after 30
LOST = r"gloo|NCCL|Connection (closed|reset|refused)|[Bb]roken pipe|Socket"


class Ranks:
    """`world` processes, of which this one is `rank`, and on its machine the number `local`. Alone it does nothing.

    Whoever calls one of the methods that exchange something has to do so on all ranks, in the same order.
    """

    def __init__(self, world: int = 1, rank: int = 0, local: int = 0, store: "dist.Store | None" = None):
        self.world, self.rank, self.local, self.store = world, rank, local, store

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def __deepcopy__(self, memo: dict) -> "Ranks":
        return self

    def sizes(self, n: int) -> list[int]:
        """Return how many of a batch of n samples each rank has: neighbours, the numbers differ by one at most."""
        return [n * (r + 1) // self.world - n * r // self.world for r in range(self.world)]

    def own(self, whole: range) -> range:
        """Return this rank's places of those of a batch."""
        n = len(whole)
        return whole[n * self.rank // self.world : n * (self.rank + 1) // self.world]

    def rows(self, n: int, parts: int) -> Tensor | None:
        """Return this rank's places (m,) in a batch of n that goes through the networks in `parts`; None: all."""
        if self.world == 1:
            return None
        return torch.cat([torch.tensor(self.own(part), dtype=torch.int64) for part in parts_of(n, parts)])

    def device(self, name: str) -> torch.device:
        """Return the device that DEVICE `name` means for this rank: of CUDA's the one with its local number."""
        device = resolve_device(name)
        if self.world == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise UserError(f"DEVICE: {name} is one for all {self.world} processes; set DEVICE cuda")
        if self.local >= torch.cuda.device_count():
            raise RunFailed(
                f"process {self.local} of this machine has no GPU of its own; start --nproc-per-node "
                f"{torch.cuda.device_count()}"
            )
        return torch.device("cuda", self.local)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up `tensors` over the ranks, in place. One flat sum for each dtype: its order never changes."""
        self._flat(tensors, dist.all_reduce)

    @torch.no_grad()
    def _flat(self, tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors) if self.world > 1 else ():
            some = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            exchange(flat)
            parts = flat.split([tensor.numel() for tensor in some])
            for tensor, part in zip(some, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def largest(self, tensor: Tensor) -> None:
        """Take the largest value of the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def wait(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            dist.barrier()

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Take over rank 0's `tensors`, in place."""
        self._flat(tensors, lambda flat: dist.broadcast(flat, 0))

    def gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the rows of all ranks, which have `sizes` of them. The gradient is the sum of all ranks'."""
        return _Gather.apply(tensor, self, sizes)

    def agree(self, asked: str, due: bool) -> tuple[str, bool]:
        """Return the signal that any rank was `asked` to stop by, and whether a checkpoint is due on rank 0."""
        if self.world == 1:
            return asked, due
        flags = torch.tensor([signal.Signals[asked].value if asked else 0, due and self.rank == 0])
        self.largest(flags)
        number, due = flags.tolist()
        return signal.Signals(number).name if number else "", bool(due)

    def from_first(self, work: Callable[[], T]) -> T:
        """Return what `work` gives on rank 0, where alone it is called; what it raises there is raised on all."""
        if self.world == 1:
            return work()
        error, answer = None, [None]
        if self.rank == 0:
            try:
                answer = [(None, work())]
            except Exception as raised:
                error = raised
                cls = type(raised) if isinstance(raised, UserError) else RunFailed
                answer = [((cls, getattr(raised, "lines", ())), None)]
        dist.broadcast_object_list(answer, 0)
        failed, value = answer[0]
        if error is not None:
            raise error
        if failed:
            raise heard(failed[0](*failed[1]))
        return value

    def after_first(self, work: Callable[[], T]) -> T:
        """Return `work()`, which rank 0 does first: it may leave files that the others find."""
        result: list[T] = []
        self.from_first(lambda: result.append(work()))
        return result[0] if result else work()

    def said(self, error: UserError) -> UserError:
        """Return `error`, which all ranks raise, for rank 0 to say."""
        return error if self.first else heard(error)

    @contextlib.contextmanager
    def own_draws(self) -> Iterator[None]:
        """Let random numbers that are drawn inside differ from rank to rank; after it all generators are alike."""
        if self.world == 1:
            yield
            return
        seed = int(torch.randint(2**62, ()))
        common = generators()
        torch.manual_seed(seed + self.rank)
        try:
            yield
        finally:
            set_generators(common)

    def lost(self, error: Exception) -> ProcessLost | None:
        """Return what to raise where `error` says that another process is gone: it names that; None for others."""
        if self.world == 1 or not (isinstance(error, dist.DistError) or re.search(LOST, str(error))):
            return None
        there = {self.rank}
        try:
            self.store.set(f"left/{self.rank}", "1")
            end = time.monotonic() + ROLL_CALL_SECONDS
            while time.monotonic() < end and len(there) < self.world:
                there |= {r for r in range(self.world) if self.store.check([f"left/{r}"])}
                time.sleep(0.1)
        except RuntimeError:  # rank 0 has the store where torchrun does not
            there -= {0}
        gone = [r for r in range(self.world) if r not in there]
        noun, verb = ("processes", "are") if len(gone) > 1 else ("process", "is")
        which = f"{noun} {', '.join(map(str, gone))}" if gone else "the connection"
        failed = ProcessLost(f"{which} of {self.world} {verb} gone; --resume auto goes on from the last checkpoint")
        return failed if self.rank == min(there) else heard(failed)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: Tensor, ranks: Ranks, sizes: Sequence[int]) -> Tensor:
        ctx.ranks, ctx.sizes = ranks, sizes
        most = max(sizes)  # all ranks send as many rows
        sent = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])]) if len(own) < most else own.contiguous()
        got = [torch.empty_like(sent) for _ in sizes]
        dist.all_gather(got, sent)
        return torch.cat([part[:size] for part, size in zip(got, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = sum(ctx.sizes[: ctx.ranks.rank])
        return gradient[start : start + ctx.sizes[ctx.ranks.rank]], None, None


def heard(error: UserError) -> UserError:
    """Return `error` as one that another process has said already."""
    error.silent = True
    return error


def parts_of(n: int, parts: int) -> list[range]:
    """Return the places of each of the `parts` of a batch of n, all of one size but the last."""
    size = -(-n // parts)
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def draws(network: nn.Module) -> bool:
    """Return whether a training pass of `network` may draw random numbers, as dropout and dropped paths do."""
    shares = (getattr(part, name, 0) for part in network.modules() for name in ("p", "drop_prob", "dropout"))
    return any(isinstance(share, float) and share > 0 for share in shares)


def own_passes(network: nn.Module, ranks: Ranks) -> list[RemovableHandle]:
    """Let every pass of `network` draw its own random numbers on each rank, until the hooks are removed."""
    drawing = contextlib.ExitStack()
    begin = network.register_forward_pre_hook(lambda *_: drawing.enter_context(ranks.own_draws()))
    return [begin, network.register_forward_hook(lambda *_: drawing.close())]


def of_this_start(store: "dist.Store", rank: int, world: int) -> "dist.Store":
    """Return the part of `store` that the `world` processes of this start alone use, as rank 0 names it.

    torchrun keeps one store over its restarts, with addresses of processes that are gone, and a restart has no number
    that is the same on all machines. So each process asks rank 0 for an answer to itself, which no earlier rank 0 has
    given.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("start", own)
        for other in range(1, world):
            asks = store.get(f"{own}/{other}").decode()
            store.set(f"{own}/{other}/{asks}", "")
        return dist.PrefixStore(own, store)
    while True:  # the first start that is found may be that of a rank 0 that is gone
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", own)
        if store.check([f"{start}/{rank}/{own}"]):
            return dist.PrefixStore(start, store)
        time.sleep(0.1)


ALONE = Ranks()


def here() -> Ranks:
    """Return the ranks of this process: those that torchrun's variables name, which are connected at the first call."""
    return _joined(int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)))


@functools.cache
def _joined(world: int, rank: int) -> Ranks:
    if world == 1:
        return ALONE
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, world = next(dist.rendezvous("env://"))
        store = of_this_start(store, rank, world)
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=world)
    except (ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:200]
        raise RunFailed(
            f"WORLD_SIZE is {world}, and its processes cannot be connected ({reason}); start them with torchrun, or "
            "unset WORLD_SIZE"
        ) from None
    atexit.register(dist.destroy_process_group)
    return Ranks(world, rank, int(os.environ.get("LOCAL_RANK", rank)), store)
