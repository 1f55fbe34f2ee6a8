"""Accuracy and loss over a data set."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from mdistiller import config
from mdistiller.bank.inference import Inference
from mdistiller.dataset import Batch, Batches, DetectionSet, ImageSet, TokenSet, dataset_dict, load_dataset
from mdistiller.device import prepare
from mdistiller.distillers import Distiller
from mdistiller.engine.ranks import ALONE, Ranks
from mdistiller.errors import OtherNetwork, UserError
from mdistiller.models import build_model, default_checkpoint, fit_inputs, give_features
from mdistiller.registry import model_refusal
from mdistiller.runs.checkpoint import load_weights

CLASSES = {"cifar10": 10, "cifar100": 100}  # of the data sets that are fetched where they are missing


class Scores(NamedTuple):
    top1: float  # percent
    top5: float | None  # percent; None for five classes or fewer, of which it is always 100
    loss: float  # mean cross entropy

    by_loss = False  # whether the best epoch is the one of the lowest loss

    @property
    def score(self) -> float:
        """The figure in percent by which the best epoch is chosen."""
        return self.top1

    @property
    def figures(self) -> dict[str, float]:
        """What a row of metrics.jsonl has of them."""
        top5 = {} if self.top5 is None else {"test_acc_top5": self.top5}
        return {"test_acc": self.top1, **top5, "test_loss": self.loss}


@torch.no_grad()
def scores_of(logits_of: Callable[[Tensor], Tensor], batches: Iterable[Batch], ranks: Ranks = ALONE) -> Scores:
    """Return scores of `logits_of`, images (B, 3, H, W) -> logits (B, K), over the batches of all `ranks`. Reads the
    device once, at the end.
    """
    counts, samples = None, 0
    for image, target, _ in batches:
        logits = logits_of(image).float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5), best first
        hit = top == target[:, None]
        loss = F.cross_entropy(logits, target, reduction="sum")
        batch = torch.stack([hit[:, 0].sum().float(), hit.sum().float(), loss])
        counts = batch if counts is None else counts + batch
        samples += len(target)
    if ranks.world > 1:
        counts = torch.cat([counts.double(), counts.new_tensor([samples]).double()])  # whole numbers stay whole
        ranks.sum([counts])
        *counts, samples = counts.tolist()
    top1, top5, loss = counts if ranks.world > 1 else counts.tolist()
    return Scores(100 * top1 / samples, 100 * top5 / samples if logits.shape[1] > 5 else None, loss / samples)


@torch.no_grad()
def scores_on_loader(val_loader: Iterable, distiller: nn.Module) -> Scores:
    """Return the scores of `distiller(image=...)`, put into eval mode, on batches that begin with (image, target)."""
    distiller.eval()
    device = next(distiller.parameters()).device
    batches = ((image.to(device), target.to(device), None) for image, target, *_ in val_loader)
    return scores_of(lambda image: distiller(image=image), batches)


def evaluation_batches(data: ImageSet | TokenSet, wanted: int, ranks: Ranks = ALONE) -> Batches:
    """Return what `data`, which lie on their device, are tested on, in batches of `wanted` samples or, of small images
    on CUDA, of more. Of several `ranks` each has every so manieth sample.
    """
    batches = data.test_batches(wanted)
    batches.tester = (ranks.rank, ranks.world)
    return batches


class ImageTest:
    """Called with a network of images: its Scores on those of `batches`, which lie on the device."""

    def __init__(self, batches: Batches, device: torch.device, amp: str = "none", ranks: Ranks = ALONE):
        self.batches, self.device, self.amp, self.ranks = batches, device, amp, ranks

    def __call__(self, network: nn.Module, batches: Iterable[Batch] | None = None) -> Scores:
        """`batches`: those of the test, where somebody watches over them."""
        inference = Inference(network, self.device, self.amp, self.batches.images.shape[1])
        return scores_of(inference, batches or self.batches, self.ranks)


def other_data(file: Path, dataset: str, num_classes: int) -> str:
    """Return what to type where the weights in `file` do not fit a data set, as the run says that wrote them; "" where
    it was trained on that one.
    """
    try:
        trained_on = config.leaves(config.read(file.parent / "config.yaml")).get("DATASET.TYPE", "")
    except UserError:
        trained_on = "NAME"
    said = f", or its data set: -d {trained_on} (-d {dataset} has {num_classes} classes)"
    return "" if trained_on in ("", dataset) else said


class Report(NamedTuple):
    """What tools/eval.py shows."""

    scores: Scores
    parameters: int
    images_per_second: float
    logits: np.ndarray  # (N, K) float32
    labels: np.ndarray  # (N,)
    classes: tuple[str, ...] = ()  # their names, where the data have some


def check_batch_size(size: int) -> None:
    """Raise UserError where `size`, of tools/eval.py's -bs, is none."""
    if not 1 <= size < 2**31:
        raise UserError(f"-bs: must be at least 1 and below 2**31; got {size}")


def loaded_networks(
    networks: Mapping[str, tuple[str, str]], section: CfgNode, batch_size: int, device: torch.device
) -> tuple[TokenSet | DetectionSet, dict[str, nn.Module]]:
    """Return the data of `section`, DATASET, and the `networks`, {what: (model, file or another source of weights)}, of
    text or detectors, all on the device. Raises UserError where a model, its weights or the data are missing or do not
    fit, or where `batch_size` is none.
    """
    for model, _ in networks.values():
        if refusal := model_refusal(model, section.TYPE):
            raise UserError(f"-m {model}: {refusal}")
    check_batch_size(batch_size)
    data, loaded = load_dataset(section.TYPE, section.ROOT, section), {}
    for what, (model, file) in networks.items():
        network = loaded[what] = build_model(model, data.num_classes, section.TYPE)
        if isinstance(data, DetectionSet):
            network.fit(data)
        path = default_checkpoint(model, section.TYPE) if file == "pretrain" else file
        load_weights(network, model, data.num_classes, path)
    return data.to(device), {what: prepare(network, device) for what, network in loaded.items()}


def evaluate_checkpoint(
    model: tuple[str, int], file: str, section: CfgNode, batch_size: int, device: torch.device, amp: str = "none",
    join: Callable[[nn.Module, ImageSet], nn.Module] = lambda network, data: network,
) -> Report:  # fmt: skip
    """Return scores of the weights in `file`: a path, another source of weights, or "pretrain", the model's default
    teacher checkpoint. `model`: its name and the size to which a library's network brings its images, 0: as they are.
    `section`: DATASET. `join` makes of their network what is to be scored.

    Raises UserError where the model, the checkpoint or the data set is missing or does not fit.
    """
    (model, size), dataset = model, section.TYPE
    for refusal in (model_refusal(model, dataset), dataset_dict.refusal(dataset)):
        if refusal:
            raise UserError(f"{refusal}; what a plug-in brings needs --plugins FILE" if ":" not in model else refusal)
    check_batch_size(batch_size)
    path = default_checkpoint(model, dataset) if file == "pretrain" else file
    # before the files of a data set are fetched that the weights do not fit
    data = None if dataset in CLASSES else load_dataset(dataset, section.ROOT, section)
    num_classes = CLASSES[dataset] if data is None else data.num_classes
    network = give_features(build_model(model, num_classes, dataset, size), False)
    try:
        load_weights(network, model, num_classes, path)
    except OtherNetwork as error:
        other = "" if f"with {num_classes} classes, but" in str(error) else other_data(Path(path), dataset, num_classes)
        raise OtherNetwork(f"{error}{other}") from None
    data = data or load_dataset(dataset, section.ROOT, section)
    fit_inputs(network, data.mean, data.std, data.test_images.shape[1])
    network = prepare(join(network, data), device)
    batches = evaluation_batches(data.to(device), batch_size)
    begin = time.monotonic()
    inference, parts = Inference(network, device, amp, data.test_images.shape[1]), []

    def logits_of(image: Tensor) -> Tensor:
        parts.append(inference(image).float().clone())
        return parts[-1]

    scores = scores_of(logits_of, batches)
    rate = batches.num_samples / (time.monotonic() - begin)
    logits, labels = torch.cat(parts).cpu().numpy(), data.test_labels.cpu().numpy()
    return Report(scores, sum(p.numel() for p in network.parameters()), rate, logits, labels, data.class_names)


def has_default_test(distiller: nn.Module) -> bool:
    """Return whether a test is the student's forward pass alone: the method changes nothing of it, and has no hooks."""
    own = any(
        getattr(getattr(distiller, name, None), "__func__", None) is not getattr(Distiller, name)
        for name in ("forward", "forward_test")
    )
    hooks = getattr(distiller, "_forward_hooks", {}) or getattr(distiller, "_forward_pre_hooks", {})
    return not own and not hooks
