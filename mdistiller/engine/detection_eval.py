"""What checkpoints of detectors say of a test set."""

import itertools
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from yacs.config import CfgNode

from mdistiller.dataset import DetectionBatches, load_dataset
from mdistiller.device import autocast, prepare
from mdistiller.engine.detection_scores import DetectionScores, DetectionTest
from mdistiller.engine.evaluator import check_batch_size, evaluation_batches
from mdistiller.errors import UserError
from mdistiller.models import build_model, default_checkpoint, in_eval_mode
from mdistiller.registry import model_refusal
from mdistiller.runs.checkpoint import load_weights

TIMED = 20  # batches by which a speed is measured


class DetectionReport(NamedTuple):
    """What tools/eval.py shows of a detector."""

    scores: DetectionScores
    parameters: int
    images_per_second: float  # of the network, its images in memory


def evaluate_detectors(
    networks: Mapping[str, tuple[str, str]], section: CfgNode, batch_size: int, device: torch.device, amp: str = "none"
) -> dict[str, DetectionReport]:
    """Return the reports on `networks`, {what: (model, file or another source of weights)}, on the test images of the
    section DATASET. Raises UserError where a model, its weights or the data are missing or do not fit.
    """
    for model, _ in networks.values():
        if refusal := model_refusal(model, section.TYPE):
            raise UserError(f"-m {model}: {refusal}")
    check_batch_size(batch_size)
    data, loaded, reports = load_dataset(section.TYPE, section.ROOT, section).to(device), {}, {}
    for what, (model, file) in networks.items():
        network = build_model(model, data.num_classes, section.TYPE)
        path = default_checkpoint(model, section.TYPE) if file == "pretrain" else file
        network.fit(data)
        load_weights(network, model, data.num_classes, path)
        loaded[what] = network
    for what, network in loaded.items():  # only now: a file that does not fit is found at once
        network, batches = prepare(network, device), evaluation_batches(data, batch_size)
        scores = DetectionTest(batches, device, amp)(network)
        count = sum(p.numel() for p in network.parameters())
        reports[what] = DetectionReport(scores, count, speed_of(network, batches, device, amp))
    return reports


@torch.no_grad()
def speed_of(network: nn.Module, batches: DetectionBatches, device: torch.device, amp: str) -> float:
    """Return images a second through the network, on at most TIMED batches."""
    images, seconds = 0, 0.0
    with in_eval_mode(network), autocast(device, amp):
        for batch in itertools.islice(batches, TIMED):
            begin = time.monotonic()
            found = network([image.to(device) for image in batch.image])
            float(found[-1]["scores"].sum())  # the device has finished
            seconds += time.monotonic() - begin
            images += len(found)
    return images / seconds
