"""The library: `train` what a configuration says, `distill` networks and data of your own, `evaluate` a network."""

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

from torch import Tensor, nn

from mdistiller.bank.inference import Inference
from mdistiller.config import Config, leaves, merge, needs_teacher, read
from mdistiller.dataset import ImageSet, image_set, load_dataset, load_images, normalised
from mdistiller.device import callers_state, prepare, resolve_device, unprepare
from mdistiller.distillers import enter
from mdistiller.engine.build import Workspace
from mdistiller.engine.cfg import load
from mdistiller.engine.evaluator import Scores, evaluation_batches, scores_of
from mdistiller.engine.method import NO_NETWORKS, Networks, check_network, layer_names
from mdistiller.engine.ranks import here
from mdistiller.engine.run import train as train_run
from mdistiller.engine.seeds import seeds_of, spread, train_seeds
from mdistiller.errors import UserError
from mdistiller.files import expand
from mdistiller.models import Ensemble, build_model, fit_inputs
from mdistiller.registry import networks_of
from mdistiller.runs import checkpoint
from mdistiller.terminal import silence

ARGUMENTS = dict.fromkeys(("LOG.PREFIX", "EXPERIMENT.PROJECT", "EXPERIMENT.NAME", "EXPERIMENT.TAG"), "folder") | {
    "DISTILLER.TEACHER": "teacher", "DISTILLER.STUDENT": "student", "DISTILLER.TYPE": "method", "DATASET.TYPE": "train",
    "DATASET.AUGMENT": "augment", "SOLVER.EPOCHS": "epochs",
}  # fmt: skip  # of distill, by the keys that they set


@dataclass(frozen=True)
class Result:
    """What a run has come to. Accuracies are top-1 on the test set, in percent; of detectors AP.

    The student takes images (B, 3, H, W) whose pixels, in [0, 1], are normalised per channel: (pixel - mean) / std.
    `md.evaluate(result, data)` does that. `amp` is the precision of the test figures, SOLVER.AMP.
    """

    last: float  # of the last epoch
    best: float  # of the best epoch, `best_epoch`
    best_epoch: int
    history: list[dict]  # the rows of metrics.jsonl, one an epoch
    student: nn.Module  # with the weights of the last epoch, in eval mode
    folder: Path | None  # the run's, None where nothing was to be kept
    seed: int
    mean: tuple[float, float, float]  # of the training images
    std: tuple[float, float, float]
    amp: str = "none"
    stopped_early: bool = False  # by SOLVER.EARLY_STOP, after the last row of `history`

    def __repr__(self) -> str:
        best = f"best={self.best:.2f} in epoch {self.best_epoch} of {len(self.history)}"
        best += ", stopped early" if self.stopped_early else ""
        folder = None if self.folder is None else str(self.folder)
        return f"Result(seed={self.seed}, last={self.last:.2f}, {best}, folder={folder!r})"


@dataclass(frozen=True)
class Results(Sequence):
    """The results of several seeds, in their order."""

    runs: tuple[Result, ...]

    def __getitem__(self, number: int) -> Result:
        return self.runs[number]

    def __len__(self) -> int:
        return len(self.runs)

    def __repr__(self) -> str:
        last, best = (f"{mean:.2f} +- {deviation:.2f}" for mean, deviation in (self.last, self.best))
        return f"Results({len(self)} seeds, last={last}, best={best})"

    @property
    def last(self) -> tuple[float, float]:
        """Mean and sample deviation of the last epoch's accuracy; a deviation of 0 for one run."""
        return _mean_and_deviation(run.last for run in self.runs)

    @property
    def best(self) -> tuple[float, float]:
        """Mean and sample deviation of the best epoch's accuracy; a deviation of 0 for one run."""
        return _mean_and_deviation(run.best for run in self.runs)


@callers_state()
def train(
    config: str | Path | Config | None = None,
    overrides: Mapping[str, object] | Sequence | None = None,
    seeds: int | Iterable[int] | None = None,
    resume: bool | str = False,
    quiet: bool = False,
) -> Result | Results:
    """Train what a configuration says, as tools/train_ours.py does.

    `config`: a YAML file, or what `load_config` gave. `overrides`: {"SOLVER.EPOCHS": 6}, or KEY, VALUE, KEY, VALUE.
    `seeds`: train a student for each of them, side by side, and return Results; an int stands for [int]; otherwise
    SEED's alone, a Result.
    `resume`: True to go on with the run, "auto" to do so if there is one. `quiet`: print nothing. The
    caller's random generators are left as they are. Raises UserError for a mistake, before anything is written.
    """
    with silence(quiet):
        return _run(load_config(config, overrides), seeds_of(seeds), resume)


@callers_state()
def distill(
    teacher: str | nn.Module | Sequence[str | nn.Module] | None = None,
    student: str | nn.Module = "resnet8",
    train: object = "digits",
    test: object = None,
    *,
    method: str | type | None = None,
    epochs: int = 30,
    folder: str | Path | None = None,
    seeds: int | Iterable[int] | None = None,
    resume: bool | str = False,
    num_classes: int = 0,
    augment: str = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    quiet: bool = False,
    layers: tuple[Sequence[str], Sequence[str]] | None = None,
    **overrides: object,
) -> Result | Results:
    """Distil `teacher` into `student` by the same loop as `train`; return the Result, or the Results of `seeds`.

    Networks are names of cifar_model_dict, timm:NAME or tv:NAME (a teacher's checkpoint then lies where
    DISTILLER.TEACHER_CKPT says), or any nn.Module that maps images (B, 3, H, W) to logits (B, K), or to (logits, feats)
    for methods that compare features. Of several teachers, [net1, net2] or ["resnet56", "resnet20"], the mean is
    distilled, DISTILLER.ENSEMBLE_MEAN. A module is copied: the student starts from its weights, under every seed.
    `method`: a name of distiller_dict or a class derived from Distiller; left out, DTKD, or NONE without a teacher.
    `layers`: for features of modules that return logits alone, the names of the teacher's and of the student's
    submodules whose outputs are compared, in the order of the forward pass, the stem first: (["stem", "layer1"],
    ["stem", "layer1"]).

    `train` and `test`: the name of a data set as `train` alone, an ImageSet as `train` alone, or each a pair (images,
    labels) or a torch Dataset of (image, label), which is read once, before training; see
    mdistiller.dataset.image_set. `num_classes`: 0 for one more than the largest label. `augment`: crop_flip, crop or
    none; auto for what the data set declares, and crop for what you bring, as only you know whether a mirror image is
    still of its class. `mean` and `std`, three numbers each, normalise the images for teacher and student: give what a
    teacher of your own was trained with. Left out they are those of the data set, or of the training images.

    `folder`: where the run keeps its checkpoints and figures, needed for `resume`; None keeps nothing. `quiet`: print
    nothing. The caller's random generators are left as they are. Other keywords are configuration keys, with __ for the
    dot: SOLVER__LR=0.1, DTKD__ALPHA=2.0, DEVICE="cpu". Unless SOLVER__LR_DECAY_STAGES says otherwise, the learning rate
    falls after 5/8, 6/8 and 7/8 of the epochs, as in the published protocol; a run that goes on keeps the falls that it
    was started with. Raises UserError for a mistake, before anything is written.
    """
    if folder is None and resume:
        raise UserError("distill: resume needs a folder; pass folder=")
    own = {key.replace("__", "."): value for key, value in overrides.items()}
    if twice := [f"{key}: pass {ARGUMENTS[key]}= in its place" for key in own if key in ARGUMENTS]:
        raise UserError(*twice)
    if not isinstance(epochs, Integral):
        raise UserError(f"epochs: must be a whole number, such as 30; got {epochs!r:.100}")
    teacher, beside = _teachers(teacher)
    for name, network in (("teacher", teacher), ("student", student)):
        check_network(name, network)
    numbers, named = seeds_of(seeds), layer_names(layers, teacher, student)
    if isinstance(method, type):
        method = enter(method)
    if method is None:
        method = "NONE" if teacher is None else "DTKD"
    data = _image_set(train, test, num_classes)
    modules = {name: part for name, part in (("student", student), ("teacher", teacher)) if isinstance(part, nn.Module)}
    if modules and data is None and (known := networks_of(train)) is not None:
        raise UserError(f"distill: networks on {train} are built by name; pass one of {', '.join(known.active)}")
    stages = sorted({stage for part in (5, 6, 7) if (stage := epochs * part // 8) > 0})
    runs = "run" if numbers is None else "run+SEED:*"
    for file in expand(folder).glob(f"{runs}/config.yaml") if resume else ():  # as the run that goes on has them
        stages = leaves(read(file)).get("SOLVER.LR_DECAY_STAGES", stages)
    keys = {"DISTILLER.TYPE": method, "DISTILLER.ENSEMBLE": beside, "DATASET.AUGMENT": augment}
    keys |= {"SOLVER.EPOCHS": epochs, "SOLVER.LR_DECAY_STAGES": stages}
    keys |= {} if "student" in modules else {"DISTILLER.STUDENT": student}
    keys |= {"DISTILLER.TEACHER": teacher} if isinstance(teacher, str) else {}
    keys |= {"DATASET.TYPE": train} if data is None else {}
    cfg = load(None, [word for pair in (keys | own).items() for word in pair], origin="keyword of distill")
    if isinstance(teacher, nn.Module) and cfg.DISTILLER.ENSEMBLE:
        raise UserError("DISTILLER.ENSEMBLE: names teachers beside one by name; pass modules as teacher=[net1, net2]")
    if isinstance(teacher, Ensemble):
        teacher.mean = cfg.DISTILLER.ENSEMBLE_MEAN
    networks = Networks(modules.get("student"), modules.get("teacher"), *named)
    if teacher is None and needs_teacher(cfg.DISTILLER.TYPE):
        raise UserError(f"distill: {cfg.DISTILLER.TYPE} needs a teacher; pass teacher=, or leave method out")
    with tempfile.TemporaryDirectory() as nowhere, silence(quiet):
        cfg = _place(cfg, Path(folder) if folder is not None else Path(nowhere), networks, data is not None)
        cfg.overrides[:] = [pair for pair in cfg.overrides if pair[0] in own] + [("EXPERIMENT.NAME", "run")]
        data = normalised(data or load_dataset(cfg.DATASET.TYPE, cfg.DATASET.ROOT, cfg.DATASET), mean, std)
        workspace = Workspace(data, here().device(cfg.DEVICE), len(numbers or [0]), networks, folder is not None)
        return _run(cfg, numbers, resume, workspace)


@callers_state()
def evaluate(
    model: str | nn.Module | Result,
    data: object,
    weights: str | Path | None = None,
    device: str = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Scores:
    """Return top-1, top-5 (both in percent) and the mean cross entropy of `model` on test images; top-5 is
    None for five classes or fewer.

    `model`: a Result, whose student is meant; a name as for `distill`, whose `weights` are needed; or an nn.Module
    as for `distill`. `data`: the name of a data set or an ImageSet, whose test part counts, or a pair (images, labels)
    or a torch Dataset. `mean` and `std`, three numbers each, normalise the images; left out they are those of the
    Result, of the data set, or, for a network on a pair or a Dataset, of these images: give what it was trained with.
    On the run's test images a Result scores what the last row of its history says. Raises UserError for a mistake.
    """
    where, amp = resolve_device(device), "none"
    if isinstance(model, Result):
        mean, std = model.mean if mean is None else mean, model.std if std is None else std
        amp = "none" if model.amp == "fp16" and where.type != "cuda" else model.amp
        model = model.student
    if isinstance(model, Results):
        raise UserError(f"model: has {len(model)} runs; pass one of them, such as runs[0]")
    check_network("model", model)
    if isinstance(model, str) and weights is None:
        raise UserError(f"evaluate: {model} is the name of a network without weights; pass weights=, a checkpoint")
    given_name = data if isinstance(data, str) else ""
    if given_name:
        data = load_images(given_name, "./data")
    elif not isinstance(data, ImageSet):
        data = image_set(data, data)
    data = normalised(data, mean, std)
    size = data.test_images.shape[1]
    network = copy.deepcopy(model) if isinstance(model, nn.Module) else build_model(model, data.num_classes, given_name)
    if isinstance(model, str):
        fit_inputs(network, data.mean, data.std, size)
    if weights is not None:
        name = type(model).__name__ if isinstance(model, nn.Module) else model
        checkpoint.load_weights(network, name, data.num_classes, weights)
    prepare(network, where).eval()
    infer = Inference(network, where, amp, size)

    def logits_of(image: Tensor) -> Tensor:
        logits = infer(image)
        if logits.ndim != 2 or len(logits) != len(image) or logits.shape[1] < data.num_classes:
            raise UserError(
                f"the model must give logits (B, K), K {data.num_classes} or more for these labels; it gives "
                f"{tuple(logits.shape)} for {len(image)} images"
            )
        return logits

    return scores_of(logits_of, evaluation_batches(data.to(where), 64))


def load_config(
    config: str | Path | Config | None = None, overrides: Mapping[str, object] | Sequence | None = None
) -> Config:
    """Return the frozen configuration of a YAML file, or of another configuration, under `overrides`.

    Raises ConfigError with one line for each mistake found, all at once.
    """
    if isinstance(overrides, str) or not isinstance(overrides, (Mapping, Sequence, type(None))):
        raise UserError(f'overrides: must be {{"SOLVER.EPOCHS": 6}}, or ["SOLVER.EPOCHS", 6]; got {overrides!r}')
    words = [word for pair in overrides.items() for word in pair] if isinstance(overrides, Mapping) else overrides or []
    if not isinstance(config, (str, Path, Config, type(None))):
        raise UserError(f"config: must be the path of a YAML file, or what load_config gave; got {type(config)}")
    if not isinstance(config, Config):
        return load(config, words, origin="overrides")
    cfg = config.clone()
    cfg.defrost()
    merge(cfg, opts=words, origin="overrides")
    cfg.freeze()
    return cfg


def _teachers(given: object) -> tuple[object, list[str]]:
    """Return the teacher, several modules as one, and the names of those beside one that is named."""
    if not isinstance(given, (list, tuple)):
        return given, []
    if given and all(isinstance(one, nn.Module) for one in given):
        return (Ensemble(given) if len(given) > 1 else given[0]), []
    if given and all(isinstance(one, str) for one in given):
        return given[0], list(given[1:])
    raise UserError("teacher: several must be modules, [net1, net2], or names, ['resnet56', 'resnet20'], not both")


def _image_set(train: object, test: object, num_classes: int) -> ImageSet | None:
    """Return the data that the caller brings, None for a data set by name."""
    if isinstance(train, (str, ImageSet)):
        if test is not None:
            raise UserError("distill: a data set brings its own test images; leave test out")
        return None if isinstance(train, str) else train
    return image_set(train, test, num_classes)


def _place(cfg: Config, root: Path, networks: Networks, arrays: bool) -> Config:
    """Return `cfg` with the run's folder set to `root`, modules named by their class, data of the caller's as
    `arrays`, and the file named that the run will keep a teacher's weights in.
    """
    cfg = cfg.clone()
    cfg.defrost()
    root = expand(root).absolute()
    cfg.LOG.PREFIX, cfg.EXPERIMENT.PROJECT = str(root.parent), root.name
    cfg.EXPERIMENT.NAME = cfg.EXPERIMENT.TAG = "run"
    for key, module in (("STUDENT", networks.student), ("TEACHER", networks.teacher)):
        if module is not None:
            cfg.DISTILLER[key] = type(module).__name__
    if isinstance(networks.teacher, Ensemble):
        cfg.DISTILLER.TEACHER, *cfg.DISTILLER.ENSEMBLE = (type(part).__name__ for part in networks.teacher.networks)
    if arrays:
        cfg.DATASET.TYPE = "arrays"
    if networks.teacher is not None and needs_teacher(cfg.DISTILLER.TYPE):
        state = {key: value.detach().cpu() for key, value in networks.teacher.state_dict().items()}
        cfg.DISTILLER.TEACHER_CKPT = str(root / f"teacher-{checkpoint.digest(state)[:12]}")
    cfg.freeze()
    return cfg


def _network(trained: nn.Module, given: nn.Module | None = None) -> nn.Module:
    """Return a network in eval mode with the weights of `trained`, as its author wrote it: a copy of `given`, or of
    itself.
    """
    if given is None:
        return unprepare(copy.deepcopy(trained)).eval()
    network = copy.deepcopy(given).to(next(trained.parameters()).device)
    network.load_state_dict(trained.state_dict())
    return network.eval()


def _run(
    cfg: Config, seeds: Sequence[int] | None, resume: bool | str, workspace: Workspace | None = None
) -> Result | Results:
    """Train SEED's student, or those of `seeds`."""
    if seeds is None:
        outcomes = [train_run(cfg, resume, workspace)]
    else:
        outcomes = train_seeds(cfg, seeds, resume, workspace)["runs"]
    given = (workspace.networks if workspace else NO_NETWORKS).student
    runs = []
    for seed, outcome in zip([cfg.SEED] if seeds is None else seeds, outcomes, strict=True):
        figures = (outcome["last_acc"], outcome["best_acc"], outcome["best_epoch"], outcome["history"])
        folder = Path(outcome["folder"]) if workspace is None or workspace.kept else None
        fed = outcome["mean"], outcome["std"], cfg.SOLVER.AMP, outcome["stopped_early"]
        runs.append(Result(*figures, _network(outcome["student"], given), folder, seed, *fed))
    return runs[0] if seeds is None else Results(tuple(runs))


def _mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    found = spread([*values])
    return found["mean"], found["std"] or 0.0
