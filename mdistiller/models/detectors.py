"""Detectors: torchvision's Faster R-CNN, RetinaNet and FCOS on feature pyramids, by names such as
tv:fasterrcnn_resnet50_fpn, and small ones of the same kinds for images of about 128 pixels, such as fasterrcnn_resnet8.

They are torchvision's own objects, with its keys. Images come float32 (3, H, W) in [0, 1], each of its own size, and
are normalised and padded by the detector; boxes are (left, top, right, bottom) in pixels, labels count from 1.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mdistiller.errors import UserError
from mdistiller.models._common import adapted
from mdistiller.models._contract import in_eval_mode
from mdistiller.models.resnet import BasicBlock
from mdistiller.registry import UnknownName, detectors, nearest

DIVISIBLE = 32  # what the sides of a padded batch are multiples of
COCO_ROWS = 91  # of torchvision's heads: COCO's numbers of categories, ten of which nobody has
RESNETS = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
WHOLE = (  # of which torchvision has COCO's weights
    "fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn",
)  # fmt: skip
EPSILON_0 = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn")  # made with that in the trunk's normalisations
BLOCKS, WIDTHS = {8: 1, 14: 2, 20: 3}, {"": 16, "x2": 32, "x4": 64}  # of the small ones: by depth, and by name


class Pass(NamedTuple):
    """What a detector has made of a training batch of B images."""

    losses: dict[str, Tensor]  # its own, by torchvision's names, scalars
    images: Tensor  # (B, 3, H, W), normalised and padded
    levels: dict[str, Tensor]  # its feature pyramid, (B, C, h, w) each, the finest first
    sizes: list[tuple[int, int]]  # the images' (height, width)
    logits: Tensor | None = None  # (P, K + 1) of the sampled proposals; None: its heads are sigmoids
    labels: Tensor | None = None  # (P,), 0 for background
    proposals: Sequence[Tensor] = ()  # B of (p, 4), P in all


class Detector(nn.Module):
    """What a detector is beside torchvision's own. `softmax`: whether each of its proposals has one class, by softmax;
    `heads`: its parts whose shapes depend on the number of classes, by how their names begin.
    """

    softmax = False
    heads: tuple[str, ...] = ("head.classification_head.cls_logits",)
    fetch: Callable[[], dict[str, Tensor]] | None = None  # gives torchvision's COCO weights, where it has them
    fetch_trunk: Callable[[], dict[str, Tensor]] | None = None  # ImageNet's under heads that are new
    class_names: tuple[str, ...] = ()  # of the data, without the background

    def fit(self, data) -> None:
        """Let images come in a test as `data`, a DetectionSet, has its views: the shorter side of so many pixels, the
        longer one of so many at most. Those of a training batch are scaled when they come. Take the classes' names.
        """
        self.transform.min_size, self.transform.max_size = (data.views.short,), data.views.long
        self.class_names = tuple(data.classes)

    @property
    def instead(self) -> str:
        """What to write where weights are asked for that torchvision does not have."""
        if self.fetch_trunk:
            return "write trunk for ImageNet's in its trunk, of a teacher with DISTILLER.TRAIN_TEACHER True"
        return "leave it out: a student has new weights, a teacher is trained by DISTILLER.TRAIN_TEACHER True"

    def batched(self, images: Sequence[Tensor], canvas: tuple[int, int] | None = None) -> Tensor:
        """Return images normalised and padded with zeros at the right and below, (B, 3, H, W): H and W are those of
        `canvas`, None for the largest image, and up to the next multiple of 32.
        """
        height, width = canvas or [max(image.shape[side] for image in images) for side in (1, 2)]
        sides = [-(-side // DIVISIBLE) * DIVISIBLE for side in (height, width)]
        padded = images[0].new_zeros(len(images), 3, *sides)
        for place, image in zip(padded, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = self.transform.normalize(image)
        return padded.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def level_shapes(self, side: int = 256) -> dict[str, tuple[int, int, int]]:
        """Return (channels, height, width) of each level of the pyramid of an image of so many pixels."""
        with in_eval_mode(self.backbone):
            levels = self.backbone(next(self.parameters()).new_zeros(1, 3, side, side))
        return {name: tuple(maps.shape[1:]) for name, maps in levels.items()}

    def train_on(
        self, images: Sequence[Tensor], targets: list[dict], seeds: Sequence[int], canvas: tuple[int, int] | None = None
    ) -> Pass:
        """Return the losses of a batch and what they were computed from. `seeds`: of each image, from which alone
        the anchors and proposals are drawn that count.
        """
        batch, sizes = self.batched(images, canvas), [tuple(image.shape[1:]) for image in images]
        return self.of_levels(Pass({}, batch, self.backbone(batch), sizes), targets, seeds)

    def of_levels(self, seen: Pass, targets: list[dict], seeds: Sequence[int]) -> Pass:
        """Return the pass with its losses: of a detector whose head sees every place of the pyramid."""
        maps = list(seen.levels.values())
        outputs, anchors = self.head(maps), self.anchor_generator(image_list(seen), maps)
        more = {}
        if hasattr(self, "center_sampling_radius"):  # FCOS
            more = {"num_anchors_per_level": [m.shape[2] * m.shape[3] for m in maps]}
        return seen._replace(losses=self.compute_loss(targets, outputs, anchors, **more))


class TwoStages(Detector):
    """A Faster R-CNN."""

    softmax = True
    heads = ("roi_heads.box_predictor.",)

    def of_levels(self, seen: Pass, targets: list[dict], seeds: Sequence[int]) -> Pass:
        from torchvision.models.detection.roi_heads import fastrcnn_loss

        self.rpn.fg_bg_sampler.seeds = self.roi_heads.fg_bg_sampler.seeds = seeds
        proposals, losses = self.rpn(image_list(seen), seen.levels, targets)
        proposals, _, labels, shifts = self.roi_heads.select_training_samples(proposals, targets)
        logits, boxes = self.roi_heads.box_predictor(self.pooled(seen.levels, proposals, seen.sizes))
        of_classes, of_boxes = fastrcnn_loss(logits, boxes, labels, shifts)
        losses = {"loss_classifier": of_classes, "loss_box_reg": of_boxes} | losses
        return seen._replace(losses=losses, logits=logits, labels=torch.cat(labels), proposals=proposals)

    def pooled(self, levels: dict[str, Tensor], proposals: Sequence[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        return self.roi_heads.box_head(self.roi_heads.box_roi_pool(levels, proposals, sizes))

    def class_logits(self, levels: dict[str, Tensor], proposals: Sequence[Tensor], sizes: list) -> Tensor:
        """Return the logits (P, K + 1) of boxes that another network has proposed, B of (p, 4)."""
        return self.roi_heads.box_predictor(self.pooled(levels, proposals, sizes))[0]


def image_list(seen: Pass):
    from torchvision.models.detection.image_list import ImageList

    return ImageList(seen.images, seen.sizes)


class Sampler:
    """Draws of each image's anchors or proposals those that a loss counts: at most `count`, at most the share
    `fraction` of them on objects. In the place of torchvision's, whose draws depend on what was drawn before: here
    those of an image depend on its entry in `seeds` alone, whatever images are beside it.
    """

    def __init__(self, count: int, fraction: float):
        self.count, self.fraction = count, fraction
        self.seeds: Sequence[int] = ()

    def __call__(self, matched: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return which of each image's are taken, on objects and on none, as uint8 masks; `matched` is at least 1, or
        0 for background, or -1 for what counts as neither.
        """
        masks: tuple[list[Tensor], list[Tensor]] = [], []
        for labels, seed in zip(matched, self.seeds, strict=True):
            generator, left = torch.Generator().manual_seed(seed), self.count
            for side, mask, most in zip((labels >= 1, labels == 0), masks, (self.fraction, 1.0), strict=True):
                places = side.nonzero()[:, 0]
                number = min(len(places), int(self.count * most), left)
                drawn = torch.randperm(len(places), generator=generator)[:number].to(places.device)
                mask.append(torch.zeros_like(labels, dtype=torch.uint8).index_fill_(0, places[drawn], 1))
                left -= number
        return masks


KINDS = {"fasterrcnn": ("FasterRCNN", TwoStages), "retinanet": ("RetinaNet", Detector), "fcos": ("FCOS", Detector)}
KNOWN = [  # what is offered of torchvision's
    *(f"{kind}_{trunk}_fpn" for kind in KINDS for trunk in RESNETS),
    "fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v2_fpn",
]  # fmt: skip


def _detector(kind: str, *given, **named) -> nn.Module:
    """Return torchvision's network of that kind as a Detector."""
    from torchvision.models import detection

    name, own = KINDS[kind]
    network = getattr(detection, name)(*given, **named, _skip_resize=True)  # training images come scaled
    network.__class__ = adapted(type(network), own)
    if own is TwoStages:
        network.rpn.fg_bg_sampler = Sampler(network.rpn.fg_bg_sampler.batch_size_per_image, 0.5)
        heads = network.roi_heads
        heads.fg_bg_sampler = Sampler(heads.fg_bg_sampler.batch_size_per_image, 0.25)
        # torchvision guesses the strides of the levels from the first batch, which may mislead for small images
        side = 4 * DIVISIBLE
        levels = network.backbone.eval()(torch.zeros(1, 3, side, side))
        heads.box_roi_pool({name: maps[:, :1] for name, maps in levels.items()}, [torch.ones(1, 4)], [(side, side)])
    return network.train()


@functools.cache
def _torchvision(name: str) -> Callable[..., nn.Module]:
    if name not in KNOWN:
        near = ", ".join(f"tv:{close}" for close in nearest(name, KNOWN, 3)) or ", ".join(KNOWN)
        raise UnknownName(f"unknown detector 'tv:{name}'; near it: {near}")
    return functools.partial(_build, name)


def _build(name: str, num_classes: int, size: int = 0) -> nn.Module:
    from torchvision.models import get_model_weights, mobilenet_v2
    from torchvision.models.detection import backbone_utils
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

    kind, _, trunk = name.removesuffix("_fpn").partition("_")
    given = {}
    if trunk in RESNETS:
        extra = {}
        if kind != "fasterrcnn":
            extra = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
        backbone = backbone_utils.resnet_fpn_backbone(
            backbone_name=trunk, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5, **extra
        )
    elif trunk == "mobilenet_v2":  # levels of a ResNet's strides, of the last block of each
        names = {block: str(level) for level, block in enumerate(("3", "6", "13", "17"))}
        backbone = backbone_utils.BackboneWithFPN(
            mobilenet_v2().features, names, [24, 32, 96, 320], 256, LastLevelMaxPool()
        )
    else:  # two levels of one size and a pooled one, as torchvision has it
        backbone = backbone_utils.mobilenet_backbone(
            backbone_name=trunk, weights=None, fpn=True, norm_layer=nn.BatchNorm2d, trainable_layers=6
        )
        given["rpn_anchor_generator"] = AnchorGenerator(((32, 64, 128, 256, 512),) * 3, ((0.5, 1.0, 2.0),) * 3)
    network = _detector(kind, backbone, num_classes, **given)

    def fetch_trunk() -> dict[str, Tensor]:
        own, weights = network.state_dict(), get_model_weights(trunk).IMAGENET1K_V1
        state = weights.get_state_dict(check_hash=True)
        state = {f"backbone.body.{key.removeprefix('features.')}": value for key, value in state.items()}
        return own | {key: value for key, value in state.items() if key in own}

    def fetch() -> dict[str, Tensor]:
        weights = get_model_weights(name).DEFAULT
        categories = weights.meta["categories"]
        rows = [row for row, category in enumerate(categories) if category != "N/A"]
        coco = network.class_names == tuple(categories[row] for row in rows[1:])
        if network.class_names and num_classes == COCO_ROWS:
            raise UserError(f"pretrained: {name}'s are of COCO's classes, and the data have 90 others; write trunk")
        state = weights.get_state_dict(check_hash=True)
        if name in EPSILON_0 and (coco or num_classes == COCO_ROWS):
            for module in network.backbone.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = 0.0
        return of_rows(state, network.state_dict(), rows) if coco else state

    network.fetch_trunk, network.fetch = fetch_trunk, fetch if name in WHOLE else None
    return network


def of_rows(state: dict[str, Tensor], own: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """Return COCO weights for the classes `rows` alone, where `own`, the network's, has so many."""
    found = dict(state)
    for key, value in state.items():
        if key in own and value.shape != own[key].shape:
            groups = value.unflatten(0, (-1, COCO_ROWS) if "cls_logits" in key else (COCO_ROWS, -1))
            dim = 1 if "cls_logits" in key else 0
            found[key] = groups.index_select(dim, torch.tensor(rows)).flatten(0, 1)
    return found


def _small(kind: str, depth: int, wide: str) -> Callable[..., nn.Module]:
    """Return the constructor of a small detector: a ResNet of three stages at strides 4, 8 and 16."""

    def constructor(num_classes: int) -> nn.Module:
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.backbone_utils import BackboneWithFPN
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.ops import MultiScaleRoIAlign
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        width, out = WIDTHS[wide], 32
        stages = [width, 2 * width, 4 * width]
        trunk = nn.Sequential()
        trunk.add_module("stem", _stem(width))
        for number, (before, channels) in enumerate(zip([width, *stages], stages, strict=False), 1):
            blocks = [BasicBlock(before, channels, 1 if number == 1 else 2)]
            blocks += [BasicBlock(channels, channels, 1) for _ in range(BLOCKS[depth] - 1)]
            parts = [part for block in blocks for part in (block, nn.ReLU())]
            trunk.add_module(f"layer{number}", nn.Sequential(*parts))
        names = {f"layer{n}": str(n - 1) for n in (1, 2, 3)}
        backbone = BackboneWithFPN(trunk, names, stages, out, LastLevelMaxPool())
        sizes = ((12,), (24,), (40,), (64,))
        if kind == "fasterrcnn":
            return _detector(
                kind,
                backbone,
                rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4),
                rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=200, rpn_pre_nms_top_n_test=200,
                rpn_post_nms_top_n_test=100, rpn_batch_size_per_image=64, box_batch_size_per_image=64,
                box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 5, 1, canonical_scale=40, canonical_level=3),
                box_head=TwoMLPHead(out * 5 * 5, 128), box_predictor=FastRCNNPredictor(128, num_classes),
            )  # fmt: skip
        if kind == "retinanet":
            anchors = AnchorGenerator(tuple((side, int(1.4 * side)) for (side,) in sizes), ((0.5, 1.0, 2.0),) * 4)
        else:
            anchors = AnchorGenerator(((4,), (8,), (16,), (32,)), ((1.0,),) * 4)  # FCOS takes a size for the stride
        return _detector(kind, backbone, num_classes, anchor_generator=anchors)

    return constructor


def _stem(width: int) -> nn.Module:
    def halving(before: int) -> list[nn.Module]:
        return [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]

    return nn.Sequential(*halving(3), *halving(width))


detectors.libraries["tv"] = _torchvision
for _kind, _depth, _wide in itertools.product(KINDS, BLOCKS, WIDTHS):
    detectors[f"{_kind}_resnet{_depth}{_wide}"] = _small(_kind, _depth, _wide)
