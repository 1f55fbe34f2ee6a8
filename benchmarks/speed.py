"""Training speed: a plain PyTorch loop, each of our modes, and the floor that the arithmetic sets, in one run.

python3 benchmarks/speed.py [--pairs resnet32x4,resnet8x4 ...] [--rounds 5] [--out results/speed]

The plain loop is what the public frameworks do: DataLoader with two workers, PIL transforms, float32, the teacher in
every step. Ours are the trainer's own steps on DTKD (without checkpoints and records, see benchmarks/overhead.py):
  off      the teacher in every step (TEACHER_BANK off)
  ahead    its pass made ahead, folded (auto where a bank does not pay)
  cold     a lazy bank that holds nothing yet: every view is computed and kept
  warm     a bank that holds every view that comes
each in float32 and, where the device has it, in bf16; on CUDA as graphs, `eager` being the steps without; `compiled` by
torch.compile, which SOLVER.STEP auto does on a CPU where a run is long enough; `5 seeds` five students side by side on
a warm bank, images/s of all together. The floor is the operations of a step (torch.utils.flop_counter; the teacher's,
where the mode runs it) over the best rate of a square matrix product measured here in the same precision. Each round
measures every mode once, in turn, so that a machine whose speed drifts slows them alike; a ratio is of one round.
Images are random: their content does not change the work.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from mdistiller.bank.inference import Inference
from mdistiller.bank.segments import Segments
from mdistiller.bank.teacher import Bank, TeacherLogits
from mdistiller.dataset import Batches
from mdistiller.device import AMP_DTYPES, has_bf16, resolve_device, set_determinism, side_stream
from mdistiller.distillers import distiller_dict
from mdistiller.engine.cfg import CFG, load
from mdistiller.engine.feed import Feed
from mdistiller.engine.method import prepare_parts
from mdistiller.engine.solver import set_lr, sgd
from mdistiller.engine.step import Step
from mdistiller.engine.stepmode import RunStep, compiled_form
from mdistiller.errors import run_command
from mdistiller.models import build_model, cifar_model_dict
from mdistiller.runs.folder import check_writable

BATCH, CLASSES, EPOCH, MEAN, STD = 64, 100, 50_000, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
NAMES = {"none": "float32", "bf16": "bf16"}
ROUND = 8e11  # operations of a round's plain steps on a CPU: seconds
AHEAD = 5  # two workers hold two batches each
PAIRS = ("resnet32x4,resnet8x4", "vgg13,vgg8", "resnet20,resnet8", "ResNet50,MobileNetV2")


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
        """Images per second of one pass, behind the batches that the workers have ready when it begins."""
        count, begin = 0, 0.0
        for number, (image, target, _) in enumerate(self.loader):
            if number == AHEAD:
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
        return (count - AHEAD * BATCH) / (time.perf_counter() - begin)


class OurLoop:
    """`seeds` students trained in turn as the trainer does. `teacher`: off, ahead, cold or warm."""

    def __init__(self, pair, images: np.ndarray, device: torch.device, amp: str, teacher: str, step: str, folder: Path,
                 seeds: int = 1):  # fmt: skip
        self.teacher, self.folder, self.epoch, self.number = teacher, folder, 20, 0
        labels = torch.arange(len(images)) % CLASSES
        local = torch.from_numpy(images).to(device)
        self.feeds, self.steps, self.streams = [], [], []
        shared = torch.cuda.Stream(device) if device.type == "cuda" else None
        for seed in range(seeds):
            batches = Batches(local, labels.to(device), MEAN, STD, BATCH, "crop_flip", seed)
            distiller = prepare_parts(distiller_dict["DTKD"](*pair(), CFG), device).train()
            optimizer = sgd(distiller.get_learnable_parameters(), 0.9, 5e-4)
            set_lr(optimizer, 0.01)
            forward, _ = compiled_form(load(None, ["SOLVER.STEP", step]), distiller, device, 0)
            logits = None
            if teacher != "off":
                if not seed:
                    inference = Inference(distiller.teacher, device, amp, captured=True)
                logits = TeacherLogits(batches, inference, stream=shared)
            graph = device.type == "cuda" and step != "eager"
            work = Step(distiller, optimizer, device, amp, forward=forward)
            self.feeds.append(Feed(batches, logits))
            self.steps.append(RunStep(work, batches, graph, exclusive=seeds == 1))
            self.streams.append(side_stream(device))
        if teacher in ("cold", "warm"):
            self.new_bank()
        if teacher == "warm":
            self.pass_once()  # the views of this epoch, which comes again and again
            self.feeds[0].teacher.bank.commit()

    def new_bank(self) -> None:
        batches = self.feeds[0].batches
        shape = (batches.num_samples * batches.views, CLASSES, torch.float16)
        bank = Bank(Segments(self.folder / f"{id(self)}-{self.number}", {}, *shape))
        if batches.images.device.type == "cuda":
            bank.rows.to_device(batches.images.device)
        self.number += 1
        for feed in self.feeds:
            feed.teacher.bank = bank

    def pass_once(self) -> None:
        """An epoch of every student, a step each in turn."""
        waiting = [
            (step, stream, feed.plans(self.epoch, 0, lambda: None))
            for step, stream, feed in zip(self.steps, self.streams, self.feeds, strict=True)
        ]
        while waiting:
            for turn in list(waiting):
                step, stream, plans = turn
                with stream:
                    given = next(plans, None)
                    if given is None:
                        waiting.remove(turn)
                        continue
                    for line in step(*given, self.epoch):
                        print(f"note: {line}", file=sys.stderr)
        for step in self.steps:
            step.step.meter.read()  # waits for the device

    def round(self) -> float:
        """Images per second of an epoch, the teacher's passes and the bank's writing included."""
        if self.teacher != "warm":
            self.epoch += 1
        if self.teacher == "cold":
            self.new_bank()
        begin = time.perf_counter()
        self.pass_once()
        if self.teacher == "cold":
            self.feeds[0].teacher.bank.commit()
        return len(self.steps) * self.feeds[0].batches.num_samples / (time.perf_counter() - begin)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some products of square matrices; of float32's in TF32 where convolutions are."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    best = 0.0
    for size in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        for attempt in range(6):
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            if attempt:
                best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def operations(pair) -> tuple[float, float]:
    """FLOP an image of the student's training step and of the teacher's forward pass."""
    student, teacher = pair()
    image = torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as step:
        F.cross_entropy(student.train()(image)[0], torch.tensor([0, 1])).backward()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        teacher.eval()(image)
    return step.get_total_flops() / 2, forward.get_total_flops() / 2


def hardware(device: torch.device) -> dict:
    chip = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        chip = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else chip,
        "cpu": chip,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        "bf16": has_bf16(torch.device("cpu")),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def precisions(device: torch.device) -> list[str]:
    return ["none"] + ["bf16"] * has_bf16(device)


def modes_of(pair, images: np.ndarray, device: torch.device, folder: Path, compiled: bool) -> dict:
    """name -> (loop, precision, whether it runs the teacher)"""
    modes = {"plain loop, float32": (PlainLoop(*pair(), images, device), "none", True)}
    amps = precisions(device)
    for amp in amps:
        name = NAMES[amp]
        if device.type == "cuda":
            modes[f"eager off, {name}"] = (OurLoop(pair, images, device, amp, "off", "eager", folder), amp, True)
        for teacher in ("off", "ahead", "cold", "warm"):
            loop = OurLoop(pair, images, device, amp, teacher, "graph", folder)
            modes[f"{teacher}, {name}"] = (loop, amp, teacher != "warm")
    ways = [("compiled ahead", "ahead", 1), ("compiled cold", "cold", 1), ("compiled warm", "warm", 1)] * compiled
    step = "compile" if compiled else "graph"
    for name, teacher, seeds in [*ways, ("5 seeds warm", "warm", 5)]:
        loop = OurLoop(pair, images, device, amps[-1], teacher, step, folder, seeds)
        modes[f"{name}, {NAMES[amps[-1]]}"] = (loop, amps[-1], teacher != "warm")
    return modes


def measure(names: str, rounds: int, steps: int | None, device: torch.device, compiled: bool, peak: dict) -> dict:
    teacher, student = names.split(",")

    def pair():
        torch.manual_seed(0)
        return build_model(student, CLASSES), build_model(teacher, CLASSES)

    own, teachers = operations(pair)
    if steps is None:
        steps = 400 if device.type == "cuda" else max(10, round(ROUND / BATCH / (own + teachers)))
    images = np.random.RandomState(0).randint(0, 256, (BATCH * steps, 32, 32, 3)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        modes = modes_of(pair, images, device, Path(folder), compiled)
        rates: dict[str, list[float]] = {name: [] for name in modes}
        for number in range(rounds + 1):
            for amp in peak:  # the best of all rounds, for a machine's speed drifts
                peak[amp] = max(peak[amp], product_rate(device, AMP_DTYPES[amp] or torch.float32))
            for name, (loop, *_) in modes.items():
                rate = loop.round()
                if number:  # the first round warms up
                    rates[name].append(rate)
    plain, rows = rates["plain loop, float32"], []
    for name, (_, amp, with_teacher) in modes.items():
        values = rates[name]
        ratios = [value / base for value, base in zip(values, plain, strict=True)]
        floor = peak[amp] / (own + teachers * with_teacher)  # images/s
        middle = statistics.median(values)
        rows.append(
            {
                "mode": name,
                "images_per_second": middle,
                "range": [min(values), max(values)],
                "seconds_an_epoch": EPOCH / middle,
                "times_plain": statistics.median(ratios),
                "times_plain_range": [min(ratios), max(ratios)],
                "floor_seconds_an_epoch": EPOCH / floor,
                "share_of_floor": middle / floor,
            }
        )
    return {
        "teacher": teacher,
        "student": student,
        "steps": steps,
        "flop_an_image": {"student_step": own, "teacher_forward": teachers},
        "matrix_product_flop_per_s": dict(peak),
        "rows": rows,
    }


def table(result: dict) -> list[str]:
    """A Markdown table that reads as one in a terminal too."""
    names = ("mode", "images/s", "range", "s an epoch", "x plain", "range", "floor, s", "of floor")
    widths = (20, 8, 15, 10, 7, 13, 8, 8)

    def line(cells: tuple) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return " | ".join([f"| {first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in rest)]) + " |"

    rates = [f"{NAMES[name]} {rate / 1e9:,.0f}" for name, rate in result["matrix_product_flop_per_s"].items()]
    title = f"**{result['teacher']} -> {result['student']}**, {result['steps']} steps a round"
    title += f" (matrix products, GFLOP/s: {', '.join(rates)})"
    lines = [title, "", line(names)]
    lines.append("|".join(["|-" + "-" * widths[0] + "-", *("-" * (width + 1) + ":" for width in widths[1:])]) + "|")
    for row in result["rows"]:
        cells = (
            row["mode"],
            f"{row['images_per_second']:,.0f}",
            "{:,.0f} - {:,.0f}".format(*row["range"]),
            f"{row['seconds_an_epoch']:,.1f}",
            f"{row['times_plain']:.2f}",
            "{:.2f} - {:.2f}".format(*row["times_plain_range"]),
            f"{row['floor_seconds_an_epoch']:,.2f}",
            f"{100 * row['share_of_floor']:.0f} %",
        )
        lines.append(line(cells))
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="TEACHER,STUDENT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="batches a round; 10 or more, by the pair's operations; on CUDA 400")
    parser.add_argument(
        "--compile", action="store_true", help="measure torch.compile as well: a minute a pair, at first"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="write the figures to OUT.json and OUT.md")
    a = parser.parse_args()
    device = resolve_device(a.device)
    set_determinism(False)
    if a.steps is not None and a.steps <= AHEAD:
        parser.error(f"--steps {a.steps}: give {AHEAD + 1} or more")
    if a.rounds < 1:
        parser.error(f"--rounds {a.rounds}: give 1 or more")
    if a.out:
        check_writable(Path(f"{a.out}.json"), "--out")
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    for names in a.pairs:
        if len(names.split(",")) != 2 or not set(names.split(",")) <= set(cifar_model_dict):
            parser.error(f"{names}: write TEACHER,STUDENT, two of {', '.join(cifar_model_dict)}")
    peak = {amp: product_rate(device, AMP_DTYPES[amp] or torch.float32) for amp in precisions(device)}
    machine = hardware(device)
    intro = [
        ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None),
        "",
        f"Batch {BATCH}, {a.rounds} rounds.",
        "",
    ]
    print("\n".join(intro))
    results, lines = [], []
    for names in a.pairs:
        results.append(measure(names, a.rounds, a.steps, device, a.compile, peak))
        lines += table(results[-1])
        print("\n".join(table(results[-1])), flush=True)
        if a.out:  # after every pair: a run takes a while
            body = {"machine": machine, "batch": BATCH, "rounds": a.rounds}
            Path(f"{a.out}.json").write_text(json.dumps(body | {"pairs": results}, indent=1) + "\n")
            title = ["# Speed", "", f"`python3 benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`", ""]
            Path(f"{a.out}.md").write_text("\n".join([*title, *intro, *lines]).rstrip() + "\n")


if __name__ == "__main__":
    run_command(main)
