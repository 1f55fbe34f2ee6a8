"""What several test files use."""

import contextlib
import functools
import importlib.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from mdistiller import config, registry
from mdistiller.bank.inference import Inference
from mdistiller.bank.teacher import TeacherLogits
from mdistiller.dataset import Batches
from mdistiller.distillers import LogitDistiller, distiller_dict
from mdistiller.engine.feed import Feed
from mdistiller.engine.graph import GraphStep
from mdistiller.engine.method import prepare_parts
from mdistiller.engine.run import train
from mdistiller.engine.seeds import train_seeds
from mdistiller.engine.solver import DOT, Schedule, set_lr, sgd
from mdistiller.engine.step import Step
from mdistiller.engine.stepmode import RunStep
from mdistiller.engine.trainer import Options, Trainer
from mdistiller.errors import UserError, run_command
from mdistiller.models import build_model, cifar_model_dict
from mdistiller.runs.keeper import Keeper
from mdistiller.runs.recorder import read_metrics
from mdistiller.runs.stop import Stop

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
OPTIONS = Options(9, temperature="samples")
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
config.load()  # fills the registries
METHODS = sorted(name for name, cls in distiller_dict.items() if cls.__module__.startswith("mdistiller."))
# one method of each kind of state that a run may keep: none but the student's; a record of temperatures; a memory of
# the samples, and numbers drawn on the device; views drawn on the host; a learned temperature; learned parameters
KINDS = ["NONE", "DTKD", "CRD", "MLKD", "CTKD", "VID"]
DRAWING = ("CRD", "MLKD")  # random numbers in a step, on its device


def gpu(test):
    """Mark a test that needs CUDA."""
    return GPU[0](GPU[1](test))


@contextlib.contextmanager
def refused(says: str, error: type[Exception] = UserError):
    """The block must raise an `error` of one line that matches `says`; it is what `as` gives."""
    with pytest.raises(error, match=says) as caught:
        yield caught
    assert len(caught.value.lines) == 1


def cases(names: list[str], on_cuda: tuple[str, ...]) -> list:
    """(name, device) for tests: all of them on the CPU, some on CUDA."""
    return [(name, "cpu") for name in names] + [pytest.param(name, "cuda", marks=GPU) for name in on_cuda]


def on(device: str, opts: list[str], epochs: int = 2) -> list[str]:
    """`opts` of a small run on that device; on CUDA for so many epochs that steps are replayed."""
    words = list(opts)
    words[words.index("DEVICE") + 1] = device
    words[words.index("SOLVER.EPOCHS") + 1] = str(epochs if device == "cpu" else 6)
    return words


def agree(a: tuple[dict, list[dict]], b: tuple[dict, list[dict]], device: str) -> bool:
    """Whether two outcomes are of the same run: bit for bit on the CPU, in their losses within rounding on CUDA."""
    if device == "cpu":
        return same(a, b)
    losses = [[row["train_loss"] for row in rows] for _, rows in (a, b)]
    return len(losses[0]) == len(losses[1]) and np.allclose(*losses, rtol=5e-2)


def save_teacher(path: Path, name: str = "resnet8", num_classes: int = 10) -> Path:
    torch.manual_seed(1)
    torch.save({"model": cifar_model_dict[name][0](num_classes=num_classes).state_dict()}, path)
    return path


def tool(name: str, *words: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run tools/NAME.py as a user would, in the folder `cwd`."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240)


def called(name: str, *words: object, cwd: Path) -> subprocess.CompletedProcess:
    """Do what `tool` does, in this process, which has imported all of it."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2)]
    before, argv, status = os.getcwd(), sys.argv, 0
    try:
        os.chdir(cwd)
        sys.argv = [f"{name}.py", *map(str, words)]
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            run_command(load_tool(name).main)
    except SystemExit as end:
        status = end.code or 0
    finally:
        os.chdir(before)
        sys.argv = argv
        registry.use([])
    for stream in streams:
        stream.seek(0)
    return subprocess.CompletedProcess(words, status, *(stream.read() for stream in streams))


def script(text: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run `text` as a Python file of its own would run in the folder `cwd`, in a forked child: what it registers and
    sets is gone with it. Return its status and all that it printed.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.NamedTemporaryFile("r") as errors:

        def work():
            os.chdir(cwd)
            with contextlib.redirect_stdout(out):
                exec(compile(text, "script.py", "exec"), {"__name__": "__main__"})
            out.flush()

        status = status_of(forked(work, errors.name))
        out.seek(0)
        return subprocess.CompletedProcess(["script.py"], status, out.read(), errors.read())


def load_tool(name: str) -> ModuleType:
    """tools/NAME.py as a module, so that its `main` can be called in this process."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluated(out: str) -> dict[str, str]:
    """Return the figures of the one network that tools/eval.py has printed, by the heads of its table."""
    _, _, head, _, cells = out.splitlines()
    return dict(zip(re.split("  +", head), re.split("  +", cells), strict=True))


def digits_opts(**changes: object) -> list[str]:
    """KEY VALUE pairs of a short run on digits; in keywords, a double underscore stands for the dot."""
    opts = {"DATASET.TYPE": "digits", "DISTILLER.STUDENT": "resnet8", "SOLVER.EPOCHS": 1, "DEVICE": "cpu"}
    opts |= {key.replace("__", "."): value for key, value in changes.items()}
    return [str(word) for pair in opts.items() for word in pair]


def photo(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """A smooth picture, so that scaling and compression change it little."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_folder(root, classes=("cat", "dog"), count=4, size=(32, 32), splits=("train", "val")):
    """Write an image folder of PNG files."""
    for split in splits:
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for place in range(count):
                photo(10 * number + place + 100 * (split == "val"), *size).save(root / split / name / f"{place}.png")
    return root


def small_run(root: Path) -> list[str]:
    """KEY VALUE pairs of a run on 40 + 20 random images, 16 x 16: three steps of 16 an epoch, taught by a resnet14."""
    arrays, generator = {}, np.random.default_rng(0)
    for split, size in (("train", 40), ("test", 20)):
        arrays[f"{split}_images"] = generator.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(size) % 10
    np.savez(root / "images.npz", **arrays)
    return digits_opts(
        DATASET__TYPE="npz", DATASET__ROOT=root / "images.npz", SOLVER__EPOCHS=2, SOLVER__BATCH_SIZE=16,
        DISTILLER__TEACHER="resnet14", DISTILLER__TEACHER_CKPT=save_teacher(root / "teacher", "resnet14"),
        DTKD__WARMUP=1, LOG__TEMPERATURE="samples", LOG__TENSORBOARD_FREQ=2, EXPERIMENT__NAME="run",
        CRD__NCE__K=8, CRD__FEAT__DIM=8,
    )  # fmt: skip


def make_trainer(
    method, folder=None, device=CPU, seed=0, *, amp="none", policy="stop", dot=False, plugin=None, samples=40,
    ahead=None, capture=None, options=OPTIONS,
):  # fmt: skip
    """A Trainer of resnet14 -> resnet8 on random images of 16 x 16, in batches of 16, the last one of 8. `plugin`: a
    class in place of the method's; `ahead`: whether the teacher is asked ahead; `capture`: in place of a CUDA graph.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (samples, 16, 16, 3), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.arange(samples, device=device) % 10
    given = images, labels, (0.5,) * 3, (0.25,) * 3, 16
    data = Batches(*given, "crop_flip", seed)
    torch.manual_seed(1)
    teacher = build_model("resnet14", 10)
    torch.manual_seed(seed)
    student = build_model("resnet8", 10)
    cfg = config.CFG.clone()
    cfg.CRD.NCE.K, cfg.CRD.FEAT.DIM = 8, 8
    cls, offered = plugin or distiller_dict[method], {"num_data": samples, "labels": labels.cpu()}
    distiller = cls(student, teacher if cls.needs_teacher else None, cfg, **{name: offered[name] for name in cls.needs})
    distiller = prepare_parts(distiller, device).train()
    parameters = distiller.get_learnable_parameters()
    optimizer = DOT(parameters, 0.9, 5e-4, 0.075) if dot else sgd(parameters, 0.9, 5e-4)
    ahead = isinstance(distiller, LogitDistiller) if ahead is None else ahead
    logits = TeacherLogits(data, Inference(teacher, device, amp)) if ahead else None
    run_step = RunStep(Step(distiller, optimizer, device, amp, policy), data)
    if capture:
        run_step.graph = GraphStep(run_step._run, distiller, device, True, capture)
    return Trainer(
        run_step, Feed(data, logits), Batches(*given), Schedule(0.02, (2,)), Keeper(folder, every_epochs=2), options
    )


class Recording:
    """Stands in for a CUDA graph: recording does nothing, a replay does the work on what was recorded."""

    made = 0

    def __init__(self, work, beside=None):
        Recording.made += 1
        self.replay = work


def train_steps(made: Trainer, epochs: int) -> tuple[list[float], list[str]]:
    """Train from the first epoch on. The loss of every step, and what was said about how steps run."""
    losses, lines = [], []
    for epoch in range(1, epochs + 1):
        made.state.start_epoch()
        set_lr(made.step.optimizer, made.schedule.at(epoch))
        made.step.temperatures = made.buffer
        for plan, logits in made.feed.plans(epoch, 0, lambda: None):
            made.step.meter.reset()
            lines += made.run_step(plan, logits, epoch)
            losses.append(made.step.meter.read()["loss"])
            made.state.done += 1
    return losses, lines


def stopping_after(items: int) -> type[Stop]:
    """A Stop to which the signal comes while it handles its item number `items`, be it a training or a test batch."""

    class Timed(Stop):
        seen = 0

        def watch(self, batches):
            for batch in super().watch(batches):
                self.seen += 1
                if self.seen == items:
                    self.signal = "SIGTERM"
                yield batch

    return Timed


def changed(opts: list[str], prefix: Path, **changes: object) -> list[str]:
    """`opts` with LOG.PREFIX and others; in keywords, a double underscore stands for the dot."""
    words = [*opts, "LOG.PREFIX", str(prefix)]
    return words + [str(word) for key, value in changes.items() for word in (key.replace("__", "."), value)]


def own_kd(file: Path, name: str, body: str = "    pass\n") -> list[str]:
    """Write the plug-in `file`, KD under that name with a class body of its own. Return KEY VALUE pairs that use it."""
    file.write_text(
        "import torch\nfrom mdistiller.distillers import register_distiller\n"
        "from mdistiller.distillers.KD import KD, kd_loss\n"
        f"@register_distiller({name!r}, defaults={{'WEIGHT': 1.0}})\nclass Own(KD):\n{body}"
    )
    return ["EXPERIMENT.PLUGINS", str(file), "DISTILLER.TYPE", name]


def unnamed(opts: list[str]) -> list[str]:
    """`opts` without EXPERIMENT.NAME, so that a run's name tells its seed."""
    place = opts.index("EXPERIMENT.NAME")
    return opts[:place] + opts[place + 2 :] + ["EXPERIMENT.TAG", "run"]


def run(opts: list[str], prefix: Path, resume: bool | str = False, **changes: object) -> Path:
    """Train a `small_run`. Return its folder."""
    return Path(train(config.load(None, changed(opts, prefix, **changes)), resume)["folder"])


def run_set(opts: list[str], prefix: Path, seeds: Iterable[int], resume: bool | str = False, **changes: object):
    """Train a `small_run` in several seeds. Return the summary, and the folder of each seed."""
    summary = train_seeds(config.load(None, changed(unnamed(opts), prefix, **changes)), list(seeds), resume)
    return summary, {run["seed"]: Path(run["folder"]) for run in summary["runs"]}


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    """All that a run's future and its reader depend on: the state in `latest` and the rows, but for what a clock says
    and how long the worklog is.
    """
    state = torch.load(folder / "latest", weights_only=True)
    rows = read_metrics(folder)
    for row in rows:
        del row["epoch_seconds"], row["tokens_per_second" if "tokens_per_second" in row else "images_per_second"]
    return {key: value for key, value in state.items() if key not in ("checksum", "log_bytes")}, rows


def same(a: object, b: object) -> bool:
    """Equal in every bit, tensors and what holds them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def forked(work: Callable[[], None], errors: str | Path = os.devnull) -> int:
    """Run `work()` in a forked child, which takes no time to start, with its output thrown away and its stderr in the
    file `errors`. Return the child's process id; it ends with the status that a command would end with.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for descriptor, path in ((1, os.devnull), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
        run_command(work)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def status_of(child: int) -> int:
    """Wait for the child's end. Return its exit status, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def as_rank(rank, world, port, work):
    """Do `work` as torchrun would have it done."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in found.items()}
    work()


def on_ranks(world, work, errors=os.devnull):
    """Return the statuses of `world` forked processes that do `work` together; each writes to `errors` + its rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = [errors if errors == os.devnull else f"{errors}{rank}" for rank in range(world)]
    children = [forked(functools.partial(as_rank, r, world, port, work), names[r]) for r in range(world)]
    return [status_of(child) for child in children]


def killed(child: int) -> bool:
    """Wait for the child's end. Return whether a SIGKILL ended it. It must not have failed."""
    status = status_of(child)
    assert status in (0, -signal.SIGKILL), "a resumed run failed"
    return status == -signal.SIGKILL


def wait_for(condition: Callable[[], object]) -> object:
    """Return what `condition()` gives as soon as it is true, which must not take two minutes."""
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def tree(folder: Path) -> dict[str, bytes | None]:
    """{name: content} of all that lies below `folder`; None for what is no regular file."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}


class Bomb:
    """Unpickled, it makes the folder `bomb`."""

    def __reduce__(self):
        return os.mkdir, ("bomb",)
