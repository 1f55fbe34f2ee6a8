"""The forms in which a trained student is deployed, and how each is written.

Every form of a classifier takes RGB images in [0, 1], float32 (B, 3, H, W) of the training images' size, B as wanted,
and gives logits (B, K): what the images are normalised by is part of it. A detector's takes one image in [0, 1],
float32 (3, H, W) of any size, scales it as the run's tests do, and gives boxes (n, 4) in its pixels, labels (n,) from
1 and scores (n,).
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from mdistiller.dataset import ImageSet
from mdistiller.files import write_atomic
from mdistiller.models import give_features

CALIBRATED = 256  # training images that INT8 is calibrated on
FOUND = ("boxes", "labels", "scores")  # what a detector gives
Infer = Callable[[np.ndarray], np.ndarray]  # images (B, 3, H, W) in [0, 1] -> logits (B, K)


class Deployed(nn.Module):
    """A network that takes pixels in [0, 1] and gives logits alone."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        for part in network.modules():  # an ensemble has several
            give_features(part, False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        output = self.network((image - self.mean) / self.std)
        return output if isinstance(output, Tensor) else output[0]


def pixels(images: Tensor) -> np.ndarray:
    """Return uint8 images (B, H, W, 3) as a form takes them, float32 (B, 3, H, W) in [0, 1]."""
    return np.ascontiguousarray(images.permute(0, 3, 1, 2).numpy(), dtype=np.float32) / np.float32(255)


def parts(images: Tensor, size: int = 64) -> Iterator[np.ndarray]:
    """Yield images, also those of files, in batches as a form takes them."""
    for start in range(0, len(images), size):
        yield pixels(images[start : min(start + size, len(images))])


def write_weights(network: nn.Module, target: Path) -> None:
    """Write the state_dict as safetensors, readable for whom the user's other files are."""
    write_atomic(target, save({key: value.contiguous() for key, value in network.state_dict().items()}))


def eager(deployed: nn.Module) -> Infer:
    """Return the network as PyTorch runs it."""

    def infer(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return deployed(torch.from_numpy(image)).numpy()

    return infer


def _program(deployed: nn.Module, data: ImageSet) -> torch.export.ExportedProgram:
    """Return the network as torch.export has it, for any number of images."""
    example = torch.zeros(2, 3, *data.test_images.shape[1:3])
    with torch.no_grad():
        return torch.export.export(deployed, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def write_torch(deployed: nn.Module, data: ImageSet, target: Path) -> Infer:
    torch.export.save(_program(deployed, data), target)
    return eager(torch.export.load(target).module())


def write_onnx(deployed: nn.Module, data: ImageSet, target: Path) -> Infer:
    names = {"input_names": ["image"], "output_names": ["logits"]}
    torch.onnx.export(_program(deployed, data), f=str(target), external_data=False, verbose=False, **names)
    return _session(target)


def onnx_session(file: Path) -> Any:
    """Return onnxruntime's session of an ONNX file, on as many threads as torch has: else it takes every core, and its
    latency would be no other form's.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _session(file: Path) -> Infer:
    session = onnx_session(file)
    return lambda image: session.run(None, {"image": image})[0]


def write_openvino(deployed: nn.Module, data: ImageSet, target: Path) -> Infer:
    import openvino

    model = openvino.convert_model(_program(deployed, data))
    openvino.save_model(model, target, compress_to_fp16=False)
    how = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(target, "CPU", how)
    return lambda image: compiled(image)[0]


def write_int8(deployed: nn.Module, data: ImageSet, target: Path) -> Infer:
    """Write the ONNX form with 8-bit weights and activations, whose ranges are those on training images."""
    from onnxruntime import quantization

    plain = target.with_suffix(".float.onnx")
    write_onnx(deployed, data, plain)
    places = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))[:CALIBRATED]

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.images = ({"image": part} for part in parts(data.train_images[places]))

        def get_next(self) -> dict | None:
            return next(self.images, None)

    prepared = target.with_suffix(".prepared.onnx")
    quantization.shape_inference.quant_pre_process(str(plain), str(prepared))
    quantization.quantize_static(str(prepared), str(target), Reader(), per_channel=True)
    plain.unlink()
    prepared.unlink()
    return _session(target)


class Kind(NamedTuple):
    """A form of a classifier: the packages that it needs, how its file's name ends, what writes it, and what it is."""

    needs: tuple[str, ...]
    suffix: str
    write: Callable[[nn.Module, ImageSet, Path], Infer]
    what: str


ONNX = ("onnx", "onnxscript", "onnxruntime")
KINDS = {
    "torch": Kind((), "pt2", write_torch, "torch.export's; `torch.export.load(FILE).module()` is the network"),
    "onnx": Kind(ONNX, "onnx", write_onnx, "ONNX, float32"),
    "openvino": Kind(("openvino",), "xml", write_openvino, "OpenVINO, float32, and its weights (.bin)"),
    "int8": Kind(
        ONNX, "int8.onnx", write_int8,
        "ONNX with 8-bit weights and activations, whose ranges are those on {calibrated}",
    ),
}  # fmt: skip


class Alone(nn.Module):
    """A detector of one image, whose answer is a tuple."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.network([image])
        return tuple(found[name] for name in FOUND)


class DetectorSession(nn.Module):
    """An ONNX file in a detector's place."""

    def __init__(self, file: Path):
        super().__init__()
        self.session = onnx_session(file)

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        found = (self.session.run(FOUND, {"image": image.numpy()}) for image in images)
        return [dict(zip(FOUND, map(torch.from_numpy, values), strict=True)) for values in found]


def write_detector(network: nn.Module, image: Tensor, target: Path) -> nn.Module:
    """Write the detector as ONNX: traced on an `image`, as torchvision's detectors are made for, for any size."""
    sizes = {"image": {1: "height", 2: "width"}} | {name: {0: "found"} for name in FOUND}
    names = {"input_names": ["image"], "output_names": [*FOUND], "dynamic_axes": sizes}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(Alone(network).eval(), (image,), str(target), dynamo=False, opset_version=17, **names)
    return DetectorSession(target)
