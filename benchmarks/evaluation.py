"""What an evaluation costs beside the epoch of training before it, on the machine at hand.

python3 benchmarks/evaluation.py --teacher resnet32x4 --student resnet8x4 [--rounds 5] [--sizes 64 250]

Seconds for 50,000 training images and for 10,000 test images, from the rate of a few batches. Training is DTKD's step
on the package's own batches, with the teacher's pass and, the harder case for the evaluation's share, with its logits
given. The plain evaluation is the student in eval mode under autocast. Each round measures everything once, in turn,
so that a machine whose speed drifts slows all alike; the table gives medians. Images are random: their content does
not change the work.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from mdistiller.bank.inference import Inference
from mdistiller.dataset import Batches
from mdistiller.device import autocast, resolve_device
from mdistiller.distillers import distiller_dict
from mdistiller.engine.cfg import CFG
from mdistiller.engine.evaluator import scores_of
from mdistiller.engine.method import prepare_parts
from mdistiller.engine.solver import set_lr, sgd
from mdistiller.engine.step import Step
from mdistiller.errors import run_command
from mdistiller.models import build_model

BATCH, CLASSES, MEAN, STD = 64, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
TRAIN, TEST = 50_000, 10_000


class GivenLogits(torch.nn.Module):
    """A teacher whose logits cost nothing."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return self.logits[: len(image)], {}


def seconds(work: Callable[[], int]) -> float:
    """Per image, of work that returns how many it has done and ends with the device idle."""
    begin = time.perf_counter()
    count = work()
    return (time.perf_counter() - begin) / count


def training(
    student: str, teacher: torch.nn.Module, amp: str, data: Batches
) -> tuple[Callable[[], int], torch.nn.Module]:
    """Return what trains `student` by DTKD for an epoch, and the method."""
    device = data.labels.device
    distiller = prepare_parts(distiller_dict["DTKD"](build_model(student, CLASSES), teacher, CFG), device)
    optimizer = sgd(distiller.train().get_learnable_parameters(), 0.9, 5e-4)
    set_lr(optimizer, 0.01)
    step = Step(distiller, optimizer, device, amp)

    def work() -> int:
        step.meter.reset()
        distiller.train()
        for batch in data.epoch(1):
            step(batch, 20)
        step.meter.read()  # waits for the device
        return step.meter.images

    return work, distiller


def report(
    a: argparse.Namespace,
    amp: str,
    device: torch.device,
    making: float,
    epochs: dict[str, float],
    each: dict[str, float],
) -> None:
    """Print the table: seconds to make the evaluated form, of the two epochs, and of each evaluation by image."""
    precision = "float32" if amp == "none" else amp
    print(
        f"\n{a.teacher} -> {a.student}, {device}, {torch.get_num_threads()} threads, {precision}, PyTorch "
        f"{torch.__version__}, {platform.machine()}; an epoch: {epochs['given']:.1f} s with the teacher's logits "
        f"given, {epochs['teacher']:.1f} s with its pass; making the evaluated form: {1000 * making:.1f} ms\n"
    )
    print("| evaluation, batch | seconds | of an epoch, logits given | of an epoch with the teacher |")
    print("| --- | --- | --- | --- |")
    for name, value in each.items():
        cost = TEST * value
        print(f"| {name} | {cost:.2f} | {cost / epochs['given']:.1%} | {cost / epochs['teacher']:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=512, help="a round")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 250], help="images in an evaluation batch")
    parser.add_argument("--device", default="auto")
    a = parser.parse_args()
    device = resolve_device(a.device)
    images = torch.randint(0, 256, (a.images, 32, 32, 3), dtype=torch.uint8).to(device)
    labels = torch.arange(a.images).to(device) % CLASSES
    data = Batches(images, labels, MEAN, STD, BATCH, "crop_flip")
    for amp in ("none", "bf16"):
        with_teacher, distiller = training(a.student, build_model(a.teacher, CLASSES), amp, data)
        given, _ = training(a.student, GivenLogits(torch.rand(BATCH, CLASSES)), amp, data)
        works = {"given": given, "teacher": with_teacher}
        for size in a.sizes:
            batches = Batches(images, labels, MEAN, STD, size)
            inference = Inference(distiller.student, device, amp)

            def plain(batches=batches, distiller=distiller, amp=amp) -> int:
                distiller.eval()
                with autocast(device, amp):
                    scores_of(lambda image: distiller(image=image), batches)
                return len(images)

            def ours(batches=batches, inference=inference) -> int:
                scores_of(inference, batches)
                return len(images)

            works |= {f"plain, {size}": plain, f"Inference, {size}": ours}
        times: dict[str, list[float]] = {name: [] for name in works}
        for number in range(a.rounds + 1):
            for name, work in works.items():
                taken = seconds(work)
                if number:  # the first round warms up
                    times[name].append(taken)
        begin = time.perf_counter()
        for _ in range(10):
            Inference(distiller.student, device, amp)
        making = (time.perf_counter() - begin) / 10
        median = {name: statistics.median(values) for name, values in times.items()}
        epochs = {name: TRAIN * median.pop(name) for name in ("given", "teacher")}
        report(a, amp, device, making, epochs, median)


if __name__ == "__main__":
    run_command(main)
