"""The parts of benchmarks/first_light.py: what each looks at, and when it is as it should be."""

import contextlib
import itertools
import json
import math
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from mdistiller.bank.inference import Inference
from mdistiller.dataset import load_dataset
from mdistiller.device import captured, has_bf16, prepare, seed_everything, set_determinism, side_stream
from mdistiller.distillers import distiller_dict
from mdistiller.engine import build
from mdistiller.engine.build import Workspace, build_trainer
from mdistiller.engine.cfg import load
from mdistiller.engine.method import build_distiller
from mdistiller.engine.run import train
from mdistiller.engine.seeds import train_seeds
from mdistiller.engine.solver import set_lr
from mdistiller.engine.trainer import Trainer
from mdistiller.errors import Preempted
from mdistiller.models import build_model
from mdistiller.runs import checkpoint
from mdistiller.runs.stop import Stop

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = {"MLKD": "ours"}  # what a method is published with; base for all others


class Part:
    """What a part finds: rows of cells, written to `file` as they come; a row that fails says why and the next comes.
    A cell `ok` says whether the row is as it should be.
    """

    def __init__(self, device: torch.device, folder: Path, file: Path):
        self.device, self.folder, self.file, self.rows = device, folder, file, {}
        self.data, self.cuda = load_dataset("digits", "."), device.type == "cuda"
        self.teacher = "resnet20" if self.cuda else "resnet8"

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[dict]:
        cells = self.rows.setdefault(name, {})
        try:
            yield cells
        except Exception as error:
            traceback.print_exc()
            cells |= {"ok": False, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]}
        self.file.write_text(json.dumps(self.rows))

    def options(self, method: str, **keys: object) -> list[str]:
        """KEY VALUE pairs of a run with resnet8 as student on digits, which scikit-learn carries."""
        opts = {"DATASET.TYPE": "digits", "DISTILLER.TYPE": method, "DEVICE": self.device, "LOG.PREFIX": self.folder}
        opts |= {"DISTILLER.TEACHER": self.teacher, "DISTILLER.STUDENT": "resnet8", "DTKD.WARMUP": 1}
        opts |= {"SOLVER.TRAINER": TRAINERS.get(method, "base")}
        opts |= {} if self.cuda else {"SOLVER.BATCH_SIZE": 16, "CRD.NCE.K": 64}
        opts |= {key.replace("__", "."): value for key, value in keys.items()}
        return [str(word) for pair in opts.items() for word in pair]

    def trainer(self, method: str, **keys: object) -> Trainer:
        """A trainer whose teacher has learned nothing and runs within the step."""
        cfg = load(None, self.options(method, **keys))
        set_determinism(cfg.DETERMINISTIC)
        seed_everything(0)
        workspace = Workspace(self.data, self.device)
        distiller = build_distiller(cfg, workspace.data, None, workspace.device)
        return build_trainer(cfg, distiller, workspace, self.folder)[0]

    def teacher_file(self) -> Path:
        torch.manual_seed(1)
        checkpoint.save({"model": build_model(self.teacher, 10).state_dict()}, self.folder / "teacher")
        return self.folder / "teacher"


def stepping(trainer: Trainer) -> Iterator[tuple[float, list[str]]]:
    """Train; yield the loss of each step, and what was said about how steps run."""
    trainer.distiller.train()
    for epoch in itertools.count(1):
        set_lr(trainer.step.optimizer, trainer.schedule.at(epoch))
        for plan, logits in trainer.feed.plans(epoch, 0, lambda: None):
            trainer.step.meter.reset()
            lines = trainer.run_step(plan, logits, epoch)
            yield trainer.step.meter.read().get("loss", math.nan), lines


def losses_of(trainer: Trainer, steps: int) -> tuple[list[float], str]:
    """Return the losses of some steps, and how the last of them ran: as a graph, compiled, or eagerly and why."""
    with side_stream(trainer.step.device):
        losses, lines = zip(*itertools.islice(stepping(trainer), steps), strict=True)
    graph, step = trainer.run_step.graph, trainer.step
    form = ["graph" if graph and graph.graphs else "eager"]
    form += [f"compiled from epoch {step.compiled_from} on"] if step.forward else []
    return list(losses), "; ".join([*form, *itertools.chain(*lines)])


def apart(a: list[float], b: list[float]) -> float:
    """Return the largest difference of two lists of losses, relative."""
    return max(abs(x - y) / max(abs(y), 1e-6) for x, y in zip(a, b, strict=True))


def broken_capture(part: Part) -> None:
    """A capture that fails on purpose, and what works after it."""
    with side_stream(part.device):
        numbers = torch.zeros(4, device=part.device)
        with part.row("a capture") as cells:
            graph, _ = captured(lambda: numbers.add_(torch.rand_like(numbers)))
            graph.replay()
            cells["ok"] = bool((numbers > 0).any())
        with part.row("one that waits for the device") as cells:
            try:
                captured(lambda: numbers.sum().item())
            except RuntimeError as error:
                cells |= {"refused": str(error).splitlines()[0]}
            cells["ok"] = "refused" in cells
        for name, work in {
            "torch.rand": lambda: torch.rand(4, device=part.device),
            "a replay of the first": graph.replay,
            "another capture": lambda: captured(lambda: numbers.mul_(2)),
        }.items():
            with part.row(f"after it: {name}") as cells:
                work()
                torch.cuda.synchronize()
                cells["ok"] = True


def no_waits(part: Part) -> None:
    """Eager steps of KD under torch's error for whatever waits for the device."""
    trainer = part.trainer("KD", SOLVER__STEP="eager")
    trainer.distiller.train()
    with part.row("KD, five steps") as cells, side_stream(part.device):
        for number, (plan, logits) in enumerate(itertools.islice(trainer.feed.plans(1, 0, lambda: None), 5)):
            torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
            trainer.run_step(plan, logits, 1)
        torch.cuda.set_sync_debug_mode("default")
        cells["ok"] = True


def methods(part: Part) -> None:
    """Every method: how its steps run by default, how long the first ones take with all that they prepare, and how far
    their losses are, relatively, from those of an eager run; another eager one says what rounding does.
    """
    first = ["NONE", "KD", "DTKD"]
    names = first + sorted(name for name in distiller_dict if name not in first)
    for amp in ["none"] + ["bf16"] * (part.cuda and has_bf16(part.device)):
        for name in [*names, "KD by DOT"]:
            with part.row(f"{name}, {amp}") as cells:
                method, keys = name.split()[0], {"SOLVER__AMP": amp}
                keys |= {"SOLVER__TRAINER": "dot"} if name.endswith("DOT") else {}
                steps = 12 if part.cuda else 2
                eager, again = (losses_of(part.trainer(method, SOLVER__STEP="eager", **keys), steps)[0] for _ in "12")
                begin = time.perf_counter()
                own, cells["steps run as"] = losses_of(part.trainer(method, **keys), steps)
                cells["seconds"] = time.perf_counter() - begin
                cells["from eager"], cells["eager from eager"] = apart(own, eager), apart(again, eager)
                allowed = (0.1 if amp == "bf16" or method in ("CRD", "MLKD") else 0.02) + 5 * cells["eager from eager"]
                cells["ok"] = cells["from eager"] <= allowed
    with part.row("KD, NAN_POLICY skip, a bad step") as cells, side_stream(part.device):
        trainer = part.trainer("KD", SOLVER__NAN_POLICY="skip")
        scale, steps = trainer.feed.batches.scale, stepping(trainer)
        kept, found = scale.clone(), []
        for number in range(9):
            scale.copy_(kept * (math.nan if number == 6 else 1))
            found.append(math.isfinite(next(steps)[0]))
        cells["ok"] = found == [number != 6 for number in range(9)]


def networks(part: Part) -> None:
    """Other students, and no momentum."""
    for student, keys in (("MobileNetV2", {}), ("ShuffleV2", {}), ("resnet8", {"SOLVER__MOMENTUM": 0.0})):
        with part.row(
            ", ".join([student, *(f"{key.replace('__', '.')} {value}" for key, value in keys.items())])
        ) as cells:
            trainer = part.trainer("KD", DISTILLER__STUDENT=student, SOLVER__LR=0.01, **keys)
            losses, cells["steps run as"] = losses_of(trainer, 6 if part.cuda else 2)
            cells["ok"] = all(map(math.isfinite, losses))


@torch.no_grad()
def inference(part: Part) -> None:
    """The folded network, captured, against the plain one: at first, with new weights, on a smaller batch."""
    model = prepare(build_model("resnet20", 10), part.device).eval()
    for name in ("first weights", "new weights"):
        fast = Inference(model, part.device, "none", captured=True)
        for call, size in (("256 images", 256), ("256 more", 256), ("100 more", 100)):
            with part.row(f"{name}, {call}") as cells:
                image = torch.randn(size, 3, 32, 32, device=part.device)
                plain = model(image)[0]
                cells["apart"] = float((fast(image) - plain).abs().max() / plain.abs().max())
                cells["ok"] = cells["apart"] < (1e-2 if part.cuda else 1e-4)
        for parameter in model.parameters():
            parameter.mul_(1.1)


def banks(part: Part) -> None:
    """A bank against none; three students on a fresh bank again and again."""
    keys = {"DISTILLER__TEACHER_CKPT": part.teacher_file(), "SOLVER__EPOCHS": 3 if part.cuda else 1}
    mode, losses = "full" if part.cuda else "lazy", {}
    for bank in ("off", mode, mode):
        with part.row(f"{bank}, warm" if bank in losses else bank) as cells:
            name = f"bank{len(part.rows)}"
            result = train(load(None, part.options("DTKD", **keys, TEACHER_BANK=bank, EXPERIMENT__NAME=name)))
            losses[bank] = [result["history"][0]["train_loss"]]  # later ones grow apart by themselves
            cells |= {"apart from off": apart(losses[bank], losses["off"])}
            cells |= {"images/s": result["history"][-1]["images_per_second"], "ok": cells["apart from off"] < 0.05}
    for number in range(5 if part.cuda else 1):
        with part.row(f"seeds 0-2 on a fresh bank, {number + 1}") as cells:
            fresh = {"TEACHER_BANK": mode, "TEACHER_BANK_FOLDER": part.folder / f"fresh{number}"}
            name = {"EXPERIMENT__NAME": f"seeds{number}"}
            done = train_seeds(load(None, part.options("DTKD", **keys, **fresh, **name)), [0, 1, 2])
            cells |= {"accuracies": [round(run["last_acc"], 1) for run in done["runs"]], "ok": True}


def resume(part: Part) -> None:
    """A run that is stopped inside an epoch and goes on: the same bits, the same draws on the device."""
    stop_at = 40 if part.cuda else 20

    class Stopped(Stop):
        seen = 0

        def watch(self, batches):
            for batch in super().watch(batches):
                self.seen += 1
                if self.seen == stop_at:
                    self.signal = "SIGTERM"
                yield batch

    for method, deterministic in (("KD", True), ("CRD", False)):
        with part.row(f"{method}, DETERMINISTIC" if deterministic else method) as cells:
            keys = {"SOLVER__EPOCHS": 3 if part.cuda else 1, "DETERMINISTIC": deterministic}
            keys |= {"DISTILLER__TEACHER_CKPT": part.teacher_file(), "TEACHER_BANK": "off"}
            runs = []
            for stop in (None, Stopped):
                cfg = load(None, part.options(method, **keys, EXPERIMENT__NAME=f"{method}{len(runs)}"))
                build.Stop = stop or Stop
                with contextlib.suppress(Preempted):
                    runs.append(train(cfg))
                build.Stop = Stop
            runs.append(train(cfg, resume=True))
            a, b = (checkpoint.load(Path(run["folder"]) / "latest") for run in runs)
            draws = [state["rng"]["cuda"] or [state["rng"]["torch"]] for state in (a, b)]
            bits = all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
            cells |= {"same bits": bits, "same draws": torch.equal(draws[0][0], draws[1][0])}
            cells |= {"losses apart": apart(*([row["train_loss"] for row in run["history"][-1:]] for run in runs))}
            cells["ok"] = cells["same draws"] and (bits or not deterministic)


def precision(part: Part) -> None:
    """The same bits twice; fp16."""
    with part.row("DTKD, DETERMINISTIC, twice") as cells:
        steps = 12 if part.cuda else 3
        one, other = (losses_of(part.trainer("DTKD", DETERMINISTIC=True), steps)[0] for _ in "12")
        cells["ok"] = one == other
    if part.cuda:
        with part.row("KD, fp16, 20 steps") as cells:
            losses, cells["steps run as"] = losses_of(part.trainer("KD", SOLVER__AMP="fp16"), 20)
            cells["ok"] = all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def compiled(part: Part) -> None:
    """torch.compile within the graph."""
    with part.row("DTKD, SOLVER.STEP compile, ten steps") as cells:
        begin = time.perf_counter()
        own, cells["steps run as"] = losses_of(part.trainer("DTKD", SOLVER__STEP="compile"), 10)
        cells["seconds"] = time.perf_counter() - begin
        cells["from eager"] = apart(own, losses_of(part.trainer("DTKD", SOLVER__STEP="eager"), 10)[0])
        cells["ok"] = cells["from eager"] < 0.02


def profile(part: Part) -> None:
    """Kernels of a step, in number and time."""
    from torch.profiler import ProfilerActivity

    kind = ProfilerActivity.CUDA if part.cuda else ProfilerActivity.CPU
    for method in ("NONE", "KD", "DTKD"):
        with part.row(method) as cells, side_stream(part.device):
            trainer, count = part.trainer(method), 50 if part.cuda else 2
            steps = stepping(trainer)
            for _ in range(5 if part.cuda else 1):
                next(steps)
            begin = time.perf_counter()
            for _ in range(count):
                next(steps)
            cells["us a step"] = 1e6 * (time.perf_counter() - begin) / count
            with torch.profiler.profile(activities=[kind]) as seen:
                for _ in range(count):
                    next(steps)
            events = [e for e in seen.events() if (e.device_type.name == "CUDA") == part.cuda]
            spent = sum(e.time_range.elapsed_us() if part.cuda else e.self_cpu_time_total for e in events)
            cells |= {"operations a step": len(events) / count, "us in them": spent / count, "ok": bool(events)}


def digits(part: Part) -> None:
    """The quickstart's run: a teacher, then its student by DTKD."""
    with part.row("resnet20, then resnet8 by DTKD") as cells:
        opts = ["LOG.PREFIX", str(part.folder), "DEVICE", str(part.device)]
        opts += [] if part.cuda else ["SOLVER.EPOCHS", "1", "SOLVER.LR_DECAY_STAGES", "[1]"]
        result = train(load(str(ROOT / "configs/digits/dtkd/res20_res8.yaml"), opts))
        cells |= {"epochs": result["epochs"], "last": result["last_acc"], "best": result["best_acc"]}
        cells |= {"images/s": result["history"][-1]["images_per_second"]}
        cells["ok"] = result["last_acc"] > (80 if part.cuda else 5)


def speed(part: Part) -> None:
    """benchmarks/speed.py's modes beside the plain loop; five seeds are the last row of a pair."""
    import speed as benchmark

    set_determinism(False)
    pairs, rounds, steps = ("resnet20,resnet8", "resnet32x4,resnet8x4"), 2 if part.cuda else 1, 400 if part.cuda else 6
    for pair in pairs if part.cuda else pairs[:1]:
        with part.row(pair):
            peak = {"none": 0.0} | ({"bf16": 0.0} if has_bf16(part.device) else {})
            for row in benchmark.measure(pair, rounds, steps, part.device, False, peak)["rows"]:
                cells = {"images/s": row["images_per_second"], "x plain": row["times_plain"], "ok": True}
                part.rows[f"{pair.replace(',', ' -> ')}, {row['mode']}"] = cells
            del part.rows[pair]


def memory(part: Part) -> None:
    """Peak memory beyond what the process has before."""
    import memory as benchmark

    amps = ["none"] + ["bf16"] * has_bf16(part.device)
    pair = ("resnet32x4", "resnet8x4") if part.cuda else ("resnet20", "resnet8")
    for way in [None, *((amp, way, "graph") for amp in amps for way in ("off", "warm"))][: 9 if part.cuda else 2]:
        with part.row(f"{way[1]}, {benchmark.NAMES[way[0]]}" if way else "plain loop, float32") as cells:
            if part.cuda:
                torch.cuda.empty_cache()
            cells["MB"] = benchmark.use(way, *pair, 12 if part.cuda else 6, part.device)
            cells |= {"pair": " -> ".join(pair), "ok": True}


def tests(part: Part) -> None:
    """pytest -m gpu, as far as it gets."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--color=no", "-p", "no:cacheprovider"]
    words += [] if part.cuda else ["tests/unit/test_graph.py"]
    counts: dict[str, int] = {}
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.match(r"(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b", line):
                name, state = found.groups()
                counts[state.lower()] = counts.get(state.lower(), 0) + 1
                if state in ("FAILED", "ERROR"):
                    part.rows[name] = {"ok": False}
            elif found := re.match(r"(?:FAILED|ERROR) (\S+::.*?) - (.*)", line):
                part.rows[found[1]] = {"ok": False, "error": found[2][:200]}
            with part.row("all") as cells:
                cells |= counts | {"ok": "passed" in counts or not part.cuda}


# In the order in which they matter: (what, seconds of ten minutes on CUDA, on a CPU; 0: left out there)
PARTS: dict[str, tuple[Callable[[Part], None], int, int]] = {
    "broken capture": (broken_capture, 30, 0),
    "no waits": (no_waits, 30, 0),
    "methods": (methods, 150, 90),
    "networks": (networks, 30, 30),
    "inference": (inference, 30, 30),
    "banks": (banks, 60, 80),
    "resume": (resume, 60, 60),
    "precision": (precision, 40, 30),
    "compiled": (compiled, 60, 0),
    "profile": (profile, 40, 30),
    "digits": (digits, 40, 40),
    "speed": (speed, 120, 120),
    "memory": (memory, 60, 30),
    "tests": (tests, 600, 90),
}
