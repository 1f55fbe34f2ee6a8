"""Training speed against a plain PyTorch loop, measured in one run on the machine at hand.

python3 benchmarks/step.py --teacher resnet32x4 --student resnet8x4 [--rounds 5] [--steps 12]

The plain loop is what the public frameworks do: DataLoader with two workers, PIL transforms, float32, the teacher in
every step. Ours runs the package's own step on its own batches, in float32 and in bf16. Each round measures every
mode once, in turn, so that a machine whose speed drifts slows them alike; the table gives the median round and the
range. Images are random: their content does not change the work.
"""

import argparse
import os
import platform
import statistics
import time

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from mdistiller.dataset import Batches
from mdistiller.distillers import distiller_dict
from mdistiller.engine.builder import build_model, prepare_parts
from mdistiller.engine.cfg import CFG
from mdistiller.engine.device import resolve_device
from mdistiller.engine.solver import set_lr, sgd
from mdistiller.engine.step import Meter, Step

BATCH, CLASSES, MEAN, STD = 64, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class Pictures(Dataset):
    def __init__(self, images: np.ndarray):
        self.images = images
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index])), index % CLASSES, index


def published_loss(v: torch.Tensor, u: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """DTKD's formula as the paper prints it, at full weight."""
    max_v, max_u = v.max(1, keepdim=True).values, u.max(1, keepdim=True).values
    t_v, t_u = 8 * max_v / (max_u + max_v), 8 * max_u / (max_u + max_v)
    dtkd = F.kl_div(F.log_softmax(v / t_v, 1), F.softmax(u / t_u, 1), reduction="none").sum(1, keepdim=True)
    kd = F.kl_div(F.log_softmax(v / 4, 1), F.softmax(u / 4, 1), reduction="batchmean") * 16
    return 3 * (dtkd * t_v * t_u).mean() + kd + F.cross_entropy(v, target)


class PlainLoop:
    def __init__(self, student, teacher, images: np.ndarray, device: torch.device):
        self.student, self.teacher, self.device = student.to(device).train(), teacher.to(device).eval(), device
        self.optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.loader = DataLoader(Pictures(images), BATCH, shuffle=True, num_workers=2, drop_last=True)

    def round(self) -> float:
        """Images per second of one pass, from the first batch on: starting the workers is not counted."""
        count, begin = 0, 0.0
        for number, (image, target, _) in enumerate(self.loader):
            if number == 1:
                begin = time.perf_counter()
            image, target = image.to(self.device), target.to(self.device)
            v, _ = self.student(image)
            with torch.no_grad():
                u, _ = self.teacher(image)
            loss = published_loss(v, u, target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()  # for the progress bar, as those loops do
            count += len(target)
        return (count - BATCH) / (time.perf_counter() - begin)


class OurLoop:
    def __init__(self, student, teacher, images: np.ndarray, device: torch.device, amp: str):
        labels = torch.arange(len(images)) % CLASSES
        self.batches = Batches(torch.from_numpy(images), labels, MEAN, STD, BATCH, device, "crop_flip")
        self.distiller = prepare_parts(distiller_dict["DTKD"](student, teacher, CFG), device).train()
        optimizer = sgd(self.distiller.get_learnable_parameters(), 0.9, 5e-4)
        set_lr(optimizer, 0.01)
        self.step, self.epoch = Step(self.distiller, optimizer, device, amp), 20

    def round(self) -> float:
        meter, begin, count = Meter(), 0.0, 0
        self.epoch += 1
        for number, batch in enumerate(self.batches.epoch(self.epoch)):
            if number == 1:
                meter.read()
                begin = time.perf_counter()
            self.step(batch, self.epoch, meter)
            count += len(batch.target)
        meter.read()  # waits for the device
        return (count - BATCH) / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="steps a round")
    parser.add_argument("--device", default="auto")
    a = parser.parse_args()
    device = resolve_device(a.device)
    images = np.random.RandomState(0).randint(0, 256, (BATCH * (a.steps + 1), 32, 32, 3)).astype(np.uint8)

    def pair():
        torch.manual_seed(0)
        return build_model(a.student, CLASSES), build_model(a.teacher, CLASSES)

    modes = {"plain loop, float32": PlainLoop(*pair(), images, device)}
    for amp in ("none", "bf16"):
        name = "float32" if amp == "none" else amp
        modes[f"ours, {name}"] = OurLoop(*pair(), images, device, amp)
    rates: dict[str, list[float]] = {name: [] for name in modes}
    for number in range(a.rounds + 1):
        for name, loop in modes.items():
            rate = loop.round()
            if number:  # the first round warms up
                rates[name].append(rate)

    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        chip += f", {capability}, {'AMX' if amx else 'no AMX'}"
    print(f"DTKD {a.teacher} -> {a.student}, batch {BATCH}, {a.rounds} rounds of {a.steps} steps; {chip}; torch "
          f"{torch.__version__}, {platform.system()}, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'mode':<22}{'images/s':>10}{'range':>18}{'x plain':>10}{'range':>14}")
    plain = rates["plain loop, float32"]
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, plain, strict=True)]
        print(
            f"{name:<22}{statistics.median(values):>10,.0f}{f'{min(values):,.0f} - {max(values):,.0f}':>18}"
            f"{statistics.median(ratios):>10.2f}{f'{min(ratios):.2f} - {max(ratios):.2f}':>14}"
        )


if __name__ == "__main__":
    main()
