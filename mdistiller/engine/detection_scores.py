"""COCO's average precision of a detector on a test, by faster-coco-eval or pycocotools."""

import contextlib
import io
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from mdistiller.dataset import Boxes, DetectionBatches
from mdistiller.device import autocast
from mdistiller.engine.evaluator import evaluation_batches, loaded_networks
from mdistiller.engine.ranks import ALONE, Ranks
from mdistiller.errors import UserError
from mdistiller.models import in_eval_mode

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # as they are written
TIMED = 20  # batches by which a speed is measured
COLUMNS = 7  # of a detection: place of its image, left, top, right, bottom, score, label


class DetectionScores(NamedTuple):
    """COCO's average precision in percent, None where no box is of that size: at overlaps (IoU) of 0.5, 0.55 to 0.95,
    of 0.5, of 0.75, and that of objects below 32 x 32 pixels, up to 96 x 96, and above.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None

    by_loss, loss = False, None

    @property
    def score(self) -> float:
        return self.ap

    @property
    def figures(self) -> dict[str, float | None]:
        """What a row of metrics.jsonl has of them; test_acc is what the best epoch is chosen by."""
        return {"test_acc": self.ap} | dict(zip(NAMES, self, strict=True))


class DetectionTest:
    """Called with a detector, list of images (3, H, W) -> list of dict(boxes, labels, scores): its DetectionScores.

    Of several `ranks` each runs the detector on some batches, all learn the same figures, and these are the same for
    any number of ranks. Raises UserError where neither library is installed.
    """

    def __init__(self, batches: DetectionBatches, device: torch.device, amp: str = "none", ranks: Ranks = ALONE):
        self.batches, self.device, self.amp, self.ranks = batches, device, amp, ranks
        evaluator()  # before anything is trained

    @torch.no_grad()
    def __call__(self, network: nn.Module, batches=None) -> DetectionScores:
        """`batches`: those of the test, where somebody watches over them."""
        found = []
        with in_eval_mode(network), autocast(self.device, self.amp):
            for images, _, index, *_ in batches or self.batches:
                answers = network([image.to(self.device) for image in images])
                found += [rows_of(place, answer) for place, answer in zip(index.tolist(), answers, strict=True)]
        own = torch.cat(found) if found else torch.zeros(0, COLUMNS, dtype=torch.float64)
        if self.ranks.world > 1:
            sizes = torch.zeros(self.ranks.world, dtype=torch.int64)
            sizes[self.ranks.rank] = len(own)
            self.ranks.sum([sizes])
            own = self.ranks.gather(own, sizes.tolist())
            own = own[own[:, 0].argsort(stable=True)]
        return self.ranks.from_first(lambda: scores_of_boxes(own.numpy(), self.batches.side.boxes))


def rows_of(place: int, answer: dict[str, Tensor]) -> Tensor:
    """Return what a detector says of the image at `place`, (n, COLUMNS) float64 on the CPU."""
    boxes, scores, labels = (answer[name].detach().cpu().double() for name in ("boxes", "scores", "labels"))
    return torch.cat([torch.full_like(scores, place)[:, None], boxes, scores[:, None], labels[:, None]], 1)


def evaluator() -> tuple[type, type]:
    """Return the classes COCO and COCOeval of the library that is there, the faster one first."""
    with contextlib.suppress(ImportError):
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    with contextlib.suppress(ImportError):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    raise UserError("average precision needs faster-coco-eval or pycocotools; pip install faster-coco-eval")


def scores_of_boxes(found: np.ndarray, truth: Boxes, library: tuple[type, type] | None = None) -> DetectionScores:
    """Return the scores of detections (n, COLUMNS), of each class in an image the best hundred, against the boxes of
    all images. A crowd may be found by several detections, which count for nothing. `library`: as `evaluator` returns
    it.
    """
    COCO, COCOeval = library or evaluator()
    place = np.repeat(np.arange(len(truth.ids)), np.diff(truth.starts))
    shared = {
        "images": [{"id": n} for n in range(len(truth.ids))],
        "categories": [
            {"id": n, "name": str(n)} for n in sorted({*truth.label.tolist(), *found[:, 6].astype(int).tolist()})
        ],
    }
    columns = place, truth.box.cpu().numpy(), truth.label.cpu().numpy(), truth.area.tolist()
    real = annotations(*columns, iscrowd=truth.crowd.long().tolist())
    size = (found[:, 3:5] - found[:, 1:3]).prod(1)
    claimed = annotations(
        found[:, 0], found[:, 1:5], found[:, 6], size.tolist(), iscrowd=[0] * len(found), score=found[:, 5].tolist()
    )
    sides = []
    with contextlib.redirect_stdout(io.StringIO()):
        for rows in (real, claimed):
            coco = COCO()
            coco.dataset = shared | {"annotations": rows}
            coco.createIndex()
            sides.append(coco)
        judge = COCOeval(*sides, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    figures = [100 * float(value) if value >= 0 else None for value in judge.stats[:6]]
    return DetectionScores(*(figure or 0.0 for figure in figures[:3]), *figures[3:])


def annotations(
    place: np.ndarray, boxes: np.ndarray, labels: np.ndarray, area: Sequence[float], **more: list
) -> list[dict]:
    """Return boxes (n, 4) as COCO's annotations, numbered from 1: 0 would mean no match."""
    boxes = boxes.astype(float)
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    rows = zip(place.astype(int).tolist(), boxes, labels.astype(int).tolist(), area, *more.values(), strict=True)
    names = ("image_id", "bbox", "category_id", "area", *more)
    return [{"id": number} | dict(zip(names, row, strict=True)) for number, row in enumerate(rows, 1)]


class DetectionReport(NamedTuple):
    """What tools/eval.py shows of a detector."""

    scores: DetectionScores
    parameters: int
    images_per_second: float  # of the network, its images in memory


def evaluate_detectors(
    networks: Mapping[str, tuple[str, str]], section: CfgNode, batch_size: int, device: torch.device, amp: str = "none"
) -> dict[str, DetectionReport]:
    """Return the reports on `networks`, which are detectors, as `loaded_networks` takes them, and raises."""
    (data, loaded), reports = loaded_networks(networks, section, batch_size, device), {}
    for what, network in loaded.items():
        batches, count = evaluation_batches(data, batch_size), sum(p.numel() for p in network.parameters())
        scores = DetectionTest(batches, device, amp)(network)
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
