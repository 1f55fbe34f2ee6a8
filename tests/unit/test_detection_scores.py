"""Average precision: that of pycocotools on the same detections, whatever library and however many processes."""

import builtins
import functools
import json
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, refused
from PIL import Image
from studies import write_detector_run
from torch import nn

from mdistiller.config import load
from mdistiller.dataset import Boxes, DetectionBatches, load_dataset
from mdistiller.dataset._detection import MOST_PIXELS, Views
from mdistiller.engine.detection import Detection
from mdistiller.engine.detection_scores import NAMES, TIMED, DetectionTest, evaluator, scores_of_boxes, speed_of
from mdistiller.engine.ranks import Ranks
from mdistiller.models import build_model
from mdistiller.runs.detections import GAP, SIDE, TITLE, draw_detections, shade
from mdistiller.study.runs import read_run
from mdistiller.study.tables import compared, text_table

pytest.importorskip("faster_coco_eval")


def random_case(seed, images=60, classes=4):
    """Boxes of all three sizes, some of them crowds, and detections: near them, elsewhere, of other classes, with
    scores of which many are the same.
    """
    random = np.random.default_rng(seed)
    boxes, labels, crowd, starts, found = [], [], [], [0], []
    for place in range(images):
        for _ in range(random.integers(0, 7)):
            size, corner = np.exp(random.uniform(np.log(8), np.log(250), 2)), random.uniform(0, 300, 2)
            boxes.append([*corner, *(corner + size)])
            labels.append(int(random.integers(1, classes + 1)))
            crowd.append(random.random() < 0.15)
            for _ in range(random.integers(0, 4)):
                near = boxes[-1] + random.normal(0, 0.08, 4) * [*size, *size]
                near[2:] = np.maximum(near[2:], near[:2] + 1)
                label = labels[-1] if random.random() < 0.8 else random.integers(1, classes + 1)
                found.append([place, *near, round(random.random(), 1), label])
        for _ in range(random.integers(0, 130) if place % 20 == 7 else 3):  # more than the hundred that count
            corner = random.uniform(0, 300, 2)
            far = corner + random.uniform(5, 200, 2)
            found.append([place, *corner, *far, random.random(), random.integers(1, 5)])
        starts.append(len(boxes))
    box = torch.tensor(boxes, dtype=torch.float32)
    area = (box[:, 2:] - box[:, :2]).prod(1) * torch.tensor(random.uniform(0.5, 1, len(box)), dtype=torch.float32)
    truth = Boxes(box, torch.tensor(labels), torch.tensor(crowd), area, tuple(starts), tuple(range(images)))
    return np.array(found, float), truth


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_pycocotools(seed):
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    found, truth = random_case(seed)
    ours = scores_of_boxes(found, truth)
    assert 1 < ours.ap < ours.ap50 and None not in ours
    assert ours == pytest.approx(scores_of_boxes(found, truth, (coco.COCO, cocoeval.COCOeval)), abs=1e-6)
    assert ours == pytest.approx(of_pycocotools(coco.COCO(), cocoeval.COCOeval, found, truth), abs=1e-6)


def of_pycocotools(real, judge, found, truth):
    """The figures as its documentation computes them: an annotation file, and detections that loadRes reads."""
    place = np.repeat(np.arange(len(truth.ids)), np.diff(truth.starts))
    real.dataset = {
        "images": [{"id": n} for n in truth.ids],
        "categories": [{"id": n} for n in range(1, 5)],
        "annotations": [
            {
                "id": 1 + n, "image_id": int(place[n]), "category_id": int(truth.label[n]),
                "area": float(truth.area[n]), "bbox": [left, top, right - left, bottom - top],
                "iscrowd": int(truth.crowd[n]),
            }
            for n, (left, top, right, bottom) in enumerate(truth.box.double().tolist())
        ],
    }  # fmt: skip
    real.createIndex()
    rows = np.concatenate([found[:, :3], found[:, 3:5] - found[:, 1:3], found[:, 5:]], 1)
    return stats_of(judge, real, rows)


def stats_of(judge, real, rows):
    judge = judge(real, real.loadRes(rows), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return [100 * float(value) for value in judge.stats[:6]]


def test_a_folder_s_figures_are_those_that_pycocotools_gives_its_json(tmp_path):
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    random, numbers = np.random.default_rng(3), (2, 7, 30)
    pictures, boxes, rows = [], [], []
    for place in range(20):
        pictures.append({"id": 1000 - 3 * place, "file_name": f"{place}.png", "width": 300, "height": 280})
        for _ in range(random.integers(0, 5)):
            left, top, width, height = (*random.uniform(0, 60, 2), *np.exp(random.uniform(2, 5.3, 2)))
            number, area = int(random.choice(numbers)), width * height * random.uniform(0.4, 1)
            box = [round(float(value), 2) for value in (left, top, width, height)]
            boxes.append({"bbox": box, "category_id": number, "area": area, "iscrowd": int(random.random() < 0.1)})
            boxes[-1] |= {"id": len(boxes), "image_id": pictures[-1]["id"]}
            near = np.array(box) + random.normal(0, 2, 4)
            rows.append([pictures[-1]["id"], *near, random.random(), number])
    tree = {"images": pictures, "annotations": boxes, "categories": [{"id": n, "name": str(n)} for n in numbers]}
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}.json").write_text(json.dumps(tree))
        for picture in pictures:
            Image.new("L", (300, 280)).save(tmp_path / split / picture["file_name"])
    truth = load_dataset("coco", tmp_path, load(None, []).DATASET).test.boxes
    found = np.array(rows)
    theirs = stats_of(cocoeval.COCOeval, coco.COCO(str(tmp_path / "val.json")), found.copy())
    found[:, 0] = [truth.ids.index(number) for number in found[:, 0]]
    found[:, 3:5] += found[:, 1:3]
    found[:, 6] = [1 + numbers.index(number) for number in found[:, 6]]
    ours = scores_of_boxes(found, truth)
    assert ours == pytest.approx(theirs, abs=1e-6) and 5 < ours.ap < 95


def test_what_is_found_exactly_is_a_hundred_percent_and_nothing_is_none():
    _, truth = random_case(0)
    place = np.repeat(np.arange(len(truth.ids)), np.diff(truth.starts))
    columns = place, *truth.box.numpy().T, np.ones(len(place)), truth.label.numpy()
    exact = np.stack(columns, 1).astype(float)
    assert scores_of_boxes(exact, truth) == pytest.approx((100,) * 6)
    assert scores_of_boxes(exact[:0], truth) == (0,) * 6
    small = truth._replace(area=torch.full_like(truth.area, 9.0))
    assert scores_of_boxes(exact, small) == pytest.approx((100, 100, 100, 100, None, None))
    other = exact.copy()
    other[:, 6] = 1 + other[:, 6] % 4
    assert scores_of_boxes(other, truth).ap < 5


class Stand(nn.Module):
    """A detector that knows the boxes, and errs by how far its images are padded, as convolutions do."""

    def __init__(self, side):
        super().__init__()
        self.known = {self.key(side.image(n).float() / 255): side.target(n) for n in range(len(side))}

    def key(self, image):
        return float(image.double().sum())

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        width = max(image.shape[2] for image in images)
        answers = []
        for image in images:
            target = self.known[self.key(image)]
            random = np.random.default_rng([width, image.shape[1]])
            shift = torch.from_numpy(random.normal(0, 2, (len(target["boxes"]), 4))).float()
            scores = torch.from_numpy(random.uniform(0, 1, len(shift)))
            answers.append({"boxes": target["boxes"] + shift, "labels": target["labels"], "scores": scores})
        return answers


class Threads(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, world, rank, shared, barrier):
        super().__init__(world, rank)
        self.shared, self.barrier = shared, barrier

    def everybodys(self, value):
        self.shared[self.rank] = value
        self.barrier.wait(60)
        values = [self.shared[rank] for rank in range(self.world)]
        self.barrier.wait(60)
        return values

    def sum(self, tensors):
        tensors[0].copy_(sum(self.everybodys(tensors[0].clone())))

    def gather(self, tensor, sizes):
        parts = self.everybodys(tensor)
        assert [len(part) for part in parts] == list(sizes)
        return torch.cat(parts)

    def from_first(self, work):
        return self.everybodys(work() if self.rank == 0 else None)[0]


@functools.cache
def small_scenes():
    words = ["DATASET.SCENES.TRAIN", "1", "DATASET.SCENES.TEST", "23"]
    return load_dataset("scenes", ".", load(None, words).DATASET)


def test_any_number_of_processes_gives_the_same_figures():
    side = small_scenes().test
    found = {}
    for world in (1, 2, 4, 9):  # of nine some have no batch
        shared, barrier, scores = {}, threading.Barrier(world), [None] * world

        def work(rank, world=world, shared=shared, barrier=barrier, scores=scores):
            batches = DetectionBatches(side, 4)
            batches.tester = rank, world
            scores[rank] = DetectionTest(batches, CPU, ranks=Threads(world, rank, shared, barrier))(Stand(side))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert scores == [scores[0]] * world and scores[0] is not None
        found[world] = scores[0]
    assert 1 < found[1].ap < 99 and found[1] == found[2] == found[4] == found[9]


def test_a_missing_library_is_a_line(monkeypatch):
    real = builtins.__import__

    def without(name, *more):
        if name.startswith(("faster_coco_eval", "pycocotools")):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with refused("pip install faster-coco-eval"):
        evaluator()


def test_a_run_leaves_a_picture_of_what_its_networks_find(tmp_path):
    data = small_scenes()
    cfg = load(None, ["DISTILLER.STUDENT", "resnet8"])
    for teacher in (None, Stand(data.test)):
        distiller = SimpleNamespace(student=Stand(data.test), teacher=teacher)
        Detection().leave(distiller, data, cfg, tmp_path)
        with Image.open(tmp_path / "detections.png") as grid:
            assert grid.size == (6 * (SIDE + GAP) - GAP, (2 if teacher is None else 3) * (TITLE + SIDE + GAP))


def test_boxes_are_drawn_where_they_are_and_weak_detections_are_not():
    image = torch.zeros(3, 60, 120, dtype=torch.uint8)
    boxes = torch.tensor([[30.0, 20.0, 90.0, 50.0], [5.0, 30.0, 20.0, 55.0]])
    labels, scores = torch.tensor([2, 1]), torch.tensor([0.9, 0.4])
    found = {"boxes": boxes, "labels": labels, "scores": scores}
    strong = found | {"scores": scores + 1}
    truth, drawn = (np.asarray(draw_detections([image], {"": [row]}, ("ant", "ox"))) for row in (strong, found))
    assert truth.shape == drawn.shape == (TITLE + SIDE + GAP, SIDE, 3)  # twice as large
    assert tuple(drawn[TITLE + 60, 60]) == tuple(drawn[TITLE + 60, 179]) == shade(2) != shade(1)
    assert tuple(drawn[TITLE + 80, 10]) == (0, 0, 0) and tuple(truth[TITLE + 80, 10]) == shade(1)


def test_a_padded_batch_of_a_test_has_a_bounded_number_of_pixels():
    detector = build_model("fasterrcnn_resnet8", 11, "scenes")
    for long, count in ((128, 8), (1333, 8), (4000, 1), (8192, 1)):
        data = replace(small_scenes(), views=Views(16, long, 1.0, 1.0, False))
        assert data.test_batches(8).batch_size == count
        images = torch.zeros(3, 16, long), torch.zeros(3, long, 16)
        assert count == 1 or count * detector.batched(images)[0, 0].numel() <= MOST_PIXELS


def test_a_row_without_strong_detections_says_so():
    image, box = torch.zeros(3, 60, 120, dtype=torch.uint8), torch.tensor([[5.0, 30.0, 20.0, 55.0]])
    found = {"boxes": box, "labels": torch.tensor([1])}

    def title(*rows):
        grid = np.asarray(draw_detections([image] * len(rows), {"ours": rows}, ("ant",)))
        return int((grid[:TITLE] < 128).any(2).sum())  # dark pixels

    weak, strong = (found | {"scores": torch.tensor([score])} for score in (0.4, 0.5))
    assert title(weak, weak) > title(weak, strong) == title(found, found) > 0


def test_a_speed_is_measured_batch_by_batch():
    data, kept, alive = small_scenes(), [], []

    class Watched(torch.nn.Module):
        def forward(self, images):
            kept.append(weakref.ref(images[0]))
            alive.append(sum(one() is not None for one in kept))
            return [{"scores": torch.ones(1)} for _ in images]

    assert speed_of(Watched(), data.test_batches(1), torch.device("cpu"), "none") > 0
    assert len(alive) == min(TIMED, len(data.test)) and max(alive) <= 2


def test_the_table_of_compared_detectors_is_narrow(tmp_path):
    folder = write_detector_run(tmp_path, **dict.fromkeys(NAMES, 30.0))
    (head, *_) = text_table(compared([read_run(folder)])).splitlines()
    assert [name in head for name in ("last AP", "best AP", "last AP50", "best AP50")] == [True] * 4
    assert not any(name in head for name in ("AP75", "APs", "APm", "APl"))
