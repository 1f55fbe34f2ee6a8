"""What of a checkout can be compared here: each of its methods tried for a step, each of its YAML files loaded."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mdistiller import config, registry
from mdistiller.config import TWO_VIEWS, Config
from mdistiller.dataset import Batch, ImageSet, TwoViews, image_set
from mdistiller.engine.build import build_optimizer
from mdistiller.engine.method import build_distiller
from mdistiller.engine.refusals import refuse_unused
from mdistiller.engine.solver import set_lr
from mdistiller.engine.step import Step
from mdistiller.errors import UserError
from mdistiller.terminal import counted

IMAGES, CLASSES, SIZE = 8, 100, 32


@dataclass
class Trial:
    """A method and the pair that it was tried on, or a YAML file; `reason` is empty where it runs."""

    name: str
    pair: str
    reason: str


@dataclass
class Fork:
    """What became of a checkout, or of a method file."""

    path: Path
    methods: list[Trial]
    files: list[Trial]
    models: int

    @property
    def text(self) -> str:
        """The tables for a terminal of 80 columns."""
        runs = sum(not trial.reason for trial in self.methods)
        methods, models = counted(len(self.methods), "method"), counted(self.models, "model")
        lines = [f"{self.path}: {methods}, {runs} of which run; {models}", ""]
        width = max([len(trial.name) for trial in self.methods], default=0)
        for trial in self.methods:
            indent = " " * (width + 4)
            reason = trial.reason.removeprefix("DISTILLER.TYPE: ").removeprefix(f"{trial.name}: ")
            said = f"refused: {reason}" if reason else f"runs on {trial.pair}"
            lines += textwrap.wrap(f"  {trial.name:{width}}  {said}", 80, subsequent_indent=indent)
        if self.files:
            loaded = sum(not trial.reason for trial in self.files)
            lines += ["", f"{counted(len(self.files), 'YAML file')}, {loaded} load"]
            reasons = Counter(trial.reason for trial in self.files if trial.reason)
            for reason, count in reasons.most_common():
                first = next(trial.name for trial in self.files if trial.reason == reason)
                lines += textwrap.wrap(f"  {count:4}  {reason} ({first})", 80, subsequent_indent=" " * 8)
        return "\n".join(lines)


def try_fork(path: Path, pairs: Sequence[str] = ()) -> Fork:
    """Import the checkout or method file at `path`, train each of its methods for a step on random images, and load
    each of its YAML files. `pairs`: KEYs and VALUEs for its methods. Raises UserError where it cannot be imported.
    """
    plugin = ["EXPERIMENT.PLUGINS", [str(path.resolve())]]
    (digest,) = config.load(None, plugin).plugins
    brought = config.PLUGINS[digest].brought
    root = config.PLUGINS[digest].package.root
    folder = root.parent if root else path.parent
    files, examples = [], {}
    for file in sorted((folder / "configs").rglob("*.y*ml")) if root else ():
        try:
            cfg = config.load(file, plugin)
        except UserError as error:
            if _is_configuration(file):
                reason = error.lines[0].replace(f" ({file})", "").removeprefix(f"{file}: ")
                files.append(Trial(str(file.relative_to(folder)), "", reason))
            continue
        files.append(Trial(str(file.relative_to(folder)), "", ""))
        examples.setdefault(cfg.DISTILLER.TYPE, []).append(file)
    methods = [try_method(name, examples.get(name, []), [*plugin, *pairs]) for name in brought.get("method", {})]
    models = sum(len(brought.get(kind, {})) for kind in ("model", "ImageNet model"))
    return Fork(path, methods, files, models)


def try_method(name: str, files: Iterable[Path], plugin: list) -> Trial:
    """Train the method for a step by the first YAML file of its own that loads, or without one."""
    words = ["DISTILLER.TYPE", name, "DISTILLER.TEACHER", "resnet20", "DISTILLER.STUDENT", "resnet8"]
    if registry.distillers[name].takes_strong_view:
        words += ["SOLVER.TRAINER", "ours"]
    reason = ""
    for file, own in [*((file, []) for file in files), (None, words)]:
        try:
            cfg = config.load(file, [*plugin, *own])
        except UserError as error:
            reason = error.lines[0]
            continue
        pair = f"{cfg.DISTILLER.TEACHER} -> {cfg.DISTILLER.STUDENT}"
        try:
            one_step(cfg)
        except UserError as error:
            return Trial(name, pair, error.lines[0])
        except Exception as error:  # whatever a method does, the others have their rows
            return Trial(name, pair, f"{type(error).__name__}: {error}".split("\n")[0])
        return Trial(name, pair, "")
    return Trial(name, "", reason)


def one_step(cfg: Config) -> dict[str, float]:
    """Train the method of `cfg` for a step on random images, on the CPU. Return its mean losses.

    Raises UserError where it does not run, or where its loss is not finite.
    """
    refuse_unused(cfg)
    torch.manual_seed(cfg.SEED)
    data, device = random_images(), torch.device("cpu")
    distiller = build_distiller(cfg, data, None, device).train()
    optimizer = build_optimizer(cfg.SOLVER, distiller.get_learnable_parameters())
    set_lr(optimizer, cfg.SOLVER.LR)
    step = Step(distiller, optimizer, device)
    image = torch.randn(IMAGES, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    given = image, data.train_labels, torch.arange(IMAGES)
    step(TwoViews(*given, image.flip(3)) if cfg.SOLVER.TRAINER in TWO_VIEWS else Batch(*given), 1)
    means = step.meter.read()
    if means.pop("skipped") or step.bad_step() >= 0:
        raise UserError(f"{cfg.DISTILLER.TYPE}: its loss or gradient is not finite on random images")
    return means


def random_images() -> ImageSet:
    images = torch.randint(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=torch.uint8)
    labels = torch.arange(IMAGES)
    return image_set((images, labels), (images, labels), CLASSES)


def _is_configuration(file: Path) -> bool:
    """Return whether a YAML file has a section of a method, or cannot even be read."""
    try:
        return "DISTILLER" in config.read(file)
    except UserError:
        return True


def find_all(paths: Iterable[Path], pairs: Sequence[str] = ()) -> str:
    """Return the tables of all checkouts and method files at `paths`, one below the other. Raises UserError where one
    of them is missing.
    """
    texts, paths = [], list(paths)
    if missing := next((path for path in paths if not path.exists()), None):
        raise UserError(f"{missing}: there is no such file or folder; name a checkout, or a .py file with a method")
    for path in paths:
        try:
            texts.append(try_fork(path, pairs).text)
        except UserError as error:
            texts.append("\n".join(textwrap.wrap(f"{path}: refused: {error}", 80, subsequent_indent="  ")))
        registry.use([])
    return "\n\n".join(texts)
