"""Method files and whole checkouts of frameworks built as mdistiller is: they run as they are, or say why not."""

from pathlib import Path

import pytest
import torch
from forks import (
    BASE,
    HEAD,
    METHODS,
    REFUSED,
    SIBLINGS,
    STEP,
    class_of,
    class_text,
    method,
    write_checkout,
    write_file,
)  # fmt: skip
from helpers import refused
from torch.nn import functional as F

from mdistiller import registry
from mdistiller.config import in_place_of_built_in, load
from mdistiller.dataset import Batch, TwoViews, image_set
from mdistiller.distillers import distiller_dict
from mdistiller.distillers.KD import KD
from mdistiller.engine.cfg import unread_overrides
from mdistiller.engine.method import build_distiller
from mdistiller.engine.refusals import refuse_unused
from mdistiller.engine.solver import set_lr, sgd
from mdistiller.engine.step import Step
from mdistiller.errors import ConfigError, RunFailed, UserError
from mdistiller.models.resnet import resnet8
from mdistiller.study.forks import find_all, random_images, try_fork


@pytest.fixture(autouse=True)
def built_ins():
    yield
    registry.use([])


def step(cfg):
    """Build the method of `cfg` and train it on one batch of eight random images. Return it and the losses."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 32, 32, 3), generator=generator, dtype=torch.uint8)
    data = image_set((images, torch.arange(8) % 4), (images, torch.arange(8) % 4))
    device = torch.device("cpu")
    distiller = build_distiller(cfg, data, None, device).train()
    optimizer = sgd(distiller.get_learnable_parameters(), 0.9, 0)
    set_lr(optimizer, 0.01)
    image = torch.rand(8, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    run = Step(distiller, optimizer, device)
    given = image, data.train_labels, torch.arange(8)
    run(TwoViews(*given, image.flip(3)) if cfg.SOLVER.TRAINER == "ours" else Batch(*given), 2)
    means = run.meter.read()
    assert means.pop("skipped") == 0 and distiller.teacher.training is (cfg.DISTILLER.TYPE == "OFD" and not cfg.plugins)
    assert distiller.eval()(image=image).shape == (8, 4)
    return distiller, means


def words(file, method, *more):
    pair = ["DISTILLER.TEACHER", "resnet14", "DISTILLER.STUDENT", "resnet8", "CRD.NCE.K", 4]
    return ["EXPERIMENT.PLUGINS", f"['{file}']", "DISTILLER.TYPE", method, *pair, *more]


MORE = {
    "never registers": ["QUIET.WEIGHT", 0.5],
    "a name held here": ["KD.LOSS.HARD_RATIO", 0.5],
    "two views": ["SOLVER.TRAINER", "ours"],
}


@pytest.mark.parametrize("cause", METHODS)
def test_a_method_file_runs_as_it_is(tmp_path, cause):
    file = write_file(tmp_path, METHODS[cause])
    for name, text in SIBLINGS.items():
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text(text)
    name = class_of(METHODS[cause])
    cfg = load(None, words(file, f"{name[:2]}_{name[2:]}".lower(), *MORE.get(cause, [])))
    assert cfg.DISTILLER.TYPE == name
    distiller, losses = step(cfg)
    assert type(distiller).__mro__[1].__module__.startswith("mdistiller_plugin_") and losses["loss"] > 0
    if cause == "arguments":
        assert (distiller.seen == 2).all()


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_outside_the_promise_is_one_line(tmp_path, case):
    text, says = REFUSED[case]
    file = write_file(tmp_path, text)
    with refused(says):
        step(load(None, words(file, class_of(text))))


def test_a_plugin_stands_in_a_built_in_methods_place_only_where_it_is_named(tmp_path):
    text = METHODS["a name held here"]
    file = write_file(tmp_path, text)
    theirs = load(None, words(file, "KD", "KD.LOSS.HARD_RATIO", 0.5))
    assert distiller_dict["KD"] is not KD and distiller_dict["KD"].__name__ == "KD"
    used = {"method": ["KD"], "model": ["resnet8"]}
    assert [*in_place_of_built_in(theirs.plugins, used)] == ["plug-in KD.py: method KD, in place of the built-in KD"]
    assert "loss/loss_of_the_fork" in step(theirs)[1]
    ours = load(None, ["DISTILLER.TYPE", "KD"])
    assert distiller_dict["KD"] is KD and not [*in_place_of_built_in(ours.plugins, used)]
    with pytest.raises(ConfigError, match=r"KD.LOSS.HARD_RATIO: unknown key"):
        load(None, ["KD.LOSS.HARD_RATIO", 0.5])
    with pytest.raises(ConfigError, match=r"KD.LOSS.HARD_RATE: unknown key"):
        load(None, words(file, "KD", "KD.LOSS.HARD_RATE", 0.5))


def test_a_plugin_that_brings_nothing_is_said(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    cfg = load(None, ["EXPERIMENT.PLUGINS", str(tmp_path / "empty.py")])
    assert "brings no method" in next(in_place_of_built_in(cfg.plugins, {}))


def test_two_views_need_a_trainer_that_gives_them(tmp_path):
    file = write_file(tmp_path, METHODS["two views"])
    with pytest.raises(UserError, match="asks for a weak and a strong view of each image: set SOLVER"):
        step(load(None, words(file, "Views")))


def test_a_whole_checkout_is_a_plugin(tmp_path):
    root = write_checkout(tmp_path / "fork")
    plugin = ["EXPERIMENT.PLUGINS", f"['{root}']"]
    cfg = load(root / "configs/cifar100/quiet.yaml", plugin)
    assert cfg.DISTILLER.TYPE == "QUIETKD" and (cfg.QUIET.WEIGHT, cfg.LEVEL, cfg.SOLVER.LR) == (0.7, 4, 0.03)
    assert cfg.SOLVER.ALPHA == 2 and cfg.LOG.WANDB is False, "where a run writes stays the user's"
    assert cfg.DKD.T == 4 and "HARD_RATE" not in cfg.KD
    distiller, losses = step(cfg)
    assert type(distiller.student).__name__ == "Tiny" and losses["loss"] > 0
    assert not isinstance(distiller, KD.__mro__[1])
    cfg = load(root / "configs/cifar100/kd.yaml", plugin)
    assert (cfg.KD.TEMPERATURE, cfg.KD.LOSS.CE_WEIGHT, cfg.KD.LOSS.HARD_RATIO, cfg.SOLVER.ALPHA) == (3, 0.5, 0.25, 1.5)
    losses = step(cfg)[1]
    assert losses["loss/loss_of_the_fork"] == pytest.approx(losses["loss"])
    used = {"method": ["KD"], "model": ["tiny", "resnet8"]}
    assert [*in_place_of_built_in(cfg.plugins, used)] == [
        "plug-in fork: method KD, in place of the built-in KD",
        "plug-in fork: model tiny and resnet8, in place of the built-in resnet8",
    ]
    for cause, text in METHODS.items():
        more = [] if cause == "never registers" else MORE.get(cause, [])
        pair = ["DISTILLER.TEACHER", "tiny", "DISTILLER.STUDENT", "tiny", "CRD.NCE.K", 4]
        step(load(None, [*plugin, "DISTILLER.TYPE", class_of(text), *pair, *more]))
    load(None, [])
    assert registry.cifar_models["resnet8"][0] is resnet8


def test_what_a_checkout_cannot_run_is_one_line(tmp_path):
    root = write_checkout(tmp_path)
    plugin = ["EXPERIMENT.PLUGINS", f"['{root}']"]
    for name, says in (
        ("heavy", "HEAVY fails on import: ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
        ("lost", "unknown model 'none_such'"),
        ("typo", r"KD.TEMPERATUR: unknown key; did you mean KD.TEMPERATURE\?"),
    ):
        with refused(says, ConfigError):
            load(root / f"configs/cifar100/{name}.yaml", plugin)
    for text, says in REFUSED.values():
        name = class_of(text)
        with pytest.raises(UserError, match=says.replace(name, name.upper(), 1)):
            pair = ["DISTILLER.TEACHER", "tiny", "DISTILLER.STUDENT", "tiny"]
            step(load(None, [*plugin, "DISTILLER.TYPE", name, *pair]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no folder distillers"):
        load(None, ["EXPERIMENT.PLUGINS", str(tmp_path / "empty")])


def test_a_checkouts_own_losses_are_its_own(tmp_path):
    """A checkout's files import each other, never ours by the same name."""
    root = write_checkout(tmp_path)
    load(root / "configs/cifar100/quiet.yaml", ["EXPERIMENT.PLUGINS", f"['{root}']"])
    module = __import__("sys").modules[distiller_dict["QUIETKD"].__module__]
    v, u = torch.randn(2, 4, 5)
    assert torch.equal(module.kd_loss(v, u, 2.0), F.mse_loss(v / 2, u / 2))


def test_the_table_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_checkout(Path("fork"))
    lone = write_file(Path("lone"), METHODS["view of features"])
    with refused("gone: there is no such file or folder; name a checkout, or a .py file with a method"):
        find_all([root, Path("gone")])
    text = find_all([root, lone, Path("lone")])
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 80
    fork = try_fork(root)
    failing = {class_of(text).upper() for text, _ in REFUSED.values()} | {"HEAVY"}
    assert {trial.name for trial in fork.methods if trial.reason} == failing
    assert {trial.name: bool(trial.reason) for trial in fork.files} == {
        f"configs/cifar100/{name}.yaml": name in ("heavy", "lost", "typo")
        for name in ("heavy", "kd", "lost", "quiet", "typo")
    }
    assert "12 methods, 7 of which run; 2 models" in text and "5 YAML files, 2 load" in text
    assert "  Flat  runs on resnet20 -> resnet8" in text and "lone: refused:" in text


ORIGINALS = "KD DKD AT NST PKT RKD SP FITNET VID OFD KDSVD CRD REVIEWKD".split()
SAME_LOSS = "KD DKD AT NST PKT RKD SP FITNET".split()  # the others draw, or scale, in another way


@pytest.mark.parametrize("method", ORIGINALS)
def test_files_of_the_originals_interface_behave_as_the_built_in_methods(method):
    pair = f"DISTILLER.TEACHER resnet8x4 DISTILLER.STUDENT resnet8x4 DISTILLER.TYPE {method} CRD.NCE.K 4".split()
    losses = []
    for plugin in ([], ["EXPERIMENT.PLUGINS", [str(Path(__file__).parents[1] / "originals.py")]]):
        torch.manual_seed(0)
        distiller, means = step(load(None, [*plugin, *pair]))
        losses.append(means)
        assert any(p.grad.abs().sum() > 0 for p in distiller.get_learnable_parameters() if p.grad is not None)
        assert (type(distiller).__module__.startswith("mdistiller.")) == (not plugin)
    assert losses[0].keys() == losses[1].keys() and losses[1]["loss"] > 0
    for name, value in losses[1].items():
        if name != "loss/loss_kd" and name != "loss" or method in SAME_LOSS:
            assert value == pytest.approx(losses[0][name], rel=5e-3), name


def test_a_method_file_may_read_logit_stand_itself(tmp_path):
    write_file(tmp_path, method("Stand", "self.stand = cfg.EXPERIMENT.LOGIT_STAND"))
    write_file(tmp_path, method("Plain", "self.stand = True"))
    cfg = load(None, words(tmp_path / "Stand.py", "STAND", "EXPERIMENT.LOGIT_STAND", True))
    refuse_unused(cfg)
    assert step(cfg)[0].stand is True
    with refused("Plain takes no temperature rule"):
        refuse_unused(load(None, words(tmp_path / "Plain.py", "PLAIN", "EXPERIMENT.LOGIT_STAND", True)))
    with refused("AT takes no temperature rule"):
        refuse_unused(load(None, words(tmp_path / "Stand.py", "AT", "EXPERIMENT.LOGIT_STAND", True)))


def test_a_constructor_may_name_its_parameters_in_any_order(tmp_path):
    for number, names in enumerate(("teacher, student, cfg", "s, t, cfg", "student, cfg, num_data")):
        given = "student, None" if "num_data" in names else "s, t" if "s, t" in names else "student, teacher"
        file = write_file(tmp_path, method(f"Order{number}", parameters=names, supers=given))
        cfg = load(None, words(file, f"ORDER{number}"))
        made = build_distiller(cfg, random_images(), None, torch.device("cpu"))
        assert sum(p.numel() for p in made.student.parameters()) == sum(
            p.numel() for p in resnet8(num_classes=100).parameters()
        )


def test_a_class_derived_from_another_method_says_itself_what_it_takes(tmp_path):
    text = method("First") + class_text(
        "Second", "self.memory = num_data", "return super().forward_train(image_strong, target)", base="First",
        parameters="student, teacher, cfg, num_data", given="image_weak, image_strong, target, **kwargs",
        supers="student, teacher, cfg",
    )  # fmt: skip
    cfg = load(None, words(write_file(tmp_path, text), "SECOND", "SOLVER.TRAINER", "ours"))
    refuse_unused(cfg)
    assert step(cfg)[0].memory == 8


def test_a_registered_class_hides_no_other_of_its_file(tmp_path):
    text = method("KD", "self.mine = True", imports="from mdistiller.distillers import register_distiller\n")
    file = write_file(tmp_path, f'{text}@register_distiller("Registered")\nclass Registered(KD):\n    pass\n', "Both")
    cfg = load(None, words(file, "KD"))
    assert build_distiller(cfg, random_images(), None, torch.device("cpu")).mine
    other = load(None, words(file, "DKD"))
    assert [*in_place_of_built_in(other.plugins, {"method": ["DKD"]})] == [
        "plug-in Both.py: this run uses nothing of it; it brings KD, Registered"
    ]
    twice = load(None, ["EXPERIMENT.PLUGINS", [str(file), str(write_file(tmp_path / "more", file.read_text()))]])
    first, second = in_place_of_built_in(twice.plugins, {"method": ["KD"]})
    assert first == "plug-in Both.py: its method KD gives way to a later plug-in's" and "in place of" in second


def test_mdistillers_names_work_inside_a_method_file(tmp_path):
    text = f"""{HEAD}
from mdistiller.models.cifar.resnet import resnet8
from mdistiller.models.imagenet.resnet import resnet34
from mdistiller.distillers.KD import KD
class Weights(KD):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.ce_loss_weight, self.kd_loss_weight = 0.0, 100.0
{class_text("Alone", "self.student = student", base="nn.Module", parameters="student", supers="")}
    def forward_test(self, image):
        return self.student(image)[0]
"""
    file = write_file(tmp_path, text, "Names")
    means = step(load(None, words(file, "WEIGHTS")))[1]
    assert means["loss/loss_ce"] == 0 and means["loss/loss_kd"] > 2
    made = build_distiller(load(None, words(file, "ALONE")), random_images(), None, torch.device("cpu"))
    assert made.teacher is None


def test_the_table_takes_the_keys_of_a_method_file(tmp_path):
    file = write_file(tmp_path, METHODS["never registers"])
    reasons = [try_fork(file, pairs).methods[0].reason for pairs in ((), ("QUIET.WEIGHT", "0.5"))]
    assert "reads the key QUIET" in reasons[0] and not reasons[1]


def test_one_broken_method_leaves_the_others_their_rows(tmp_path):
    text = f"{HEAD}{class_text('Exits', 'raise SystemExit(3)')}{class_text('Sound')}"
    for name, learnt in (("Learn", "self.nowhere"), ("Groups", "[{'params': self.student.parameters()}]")):
        text += f"{class_text(name)}    def get_learnable_parameters(self):\n        return {learnt}\n\n"
    reasons = {trial.name: trial.reason for trial in try_fork(write_file(tmp_path, text)).methods}
    assert "nowhere" in reasons["Learn"] and "list of parameters" in reasons["Groups"]
    assert "SystemExit" in reasons["Exits"] and not reasons["Sound"]


def test_a_method_beside_the_file_comes_before_ours(tmp_path):
    sibling = "import torch.nn.functional as F\ndef kd_loss(v, u, t):\n    return 7 * F.mse_loss(v, v)\n"
    (tmp_path / "KD.py").write_text(sibling + "def other():\n    pass\n")
    (tmp_path / "DKD.py").write_text("x = 1\n")
    text = method("Both", imports="from .KD import kd_loss\nfrom .DKD import dkd_loss")
    cfg = load(None, words(write_file(tmp_path, f"{text}    losses = kd_loss, dkd_loss\n"), "BOTH"))
    theirs, ours = distiller_dict["Both"].losses
    assert (
        cfg.plugins
        and theirs.__module__.startswith("mdistiller_plugin_")
        and ours.__module__ == "mdistiller.distillers.DKD"
    )


def test_constructors_and_steps_with_variable_arguments(tmp_path):
    second = """
    assert kwargs["index"].shape == kwargs["contrastive_index"][:, 0].shape and kwargs["epoch"]
    return super().forward_train(kwargs["image_strong"], target)
    """
    text = method("First", "self.memory = num_data", parameters="student, teacher, cfg, num_data")
    text += class_text("Second", "", second, "*args, **kwargs", base="First", supers="*args, **kwargs")
    text += class_text("Third", "self.weight = args[2].KD.TEMPERATURE", parameters="*args", supers="*args[:2]")
    file = write_file(tmp_path, text)
    assert step(load(None, words(file, "SECOND", "SOLVER.TRAINER", "ours")))[0].memory == 8
    assert step(load(None, words(file, "THIRD")))[0].weight == 4


def test_cuda_is_the_runs_device_on_import_and_in_classes_of_ours(tmp_path):
    text = f"""from __future__ import annotations
{HEAD}
from mdistiller.distillers.KD import KD
WEIGHTS = torch.ones(4).cuda()
class Warm(KD):
    def __init__(self, student, teacher, cfg: NoSuchName):
        super().__init__(student, teacher, cfg)
        self.extra = nn.Linear(2, 2).cuda()
"""
    file = write_file(tmp_path, text)
    assert step(load(None, words(file, "WARM")))[1]["loss/loss_kd"] > 0


def test_a_checkouts_defaults_are_what_its_methods_read(tmp_path):
    """Defaults of other methods that a helper reads, and those of another kind than ours."""
    root = write_checkout(tmp_path)
    cfg_file, kd_file = root / "mdistiller/engine/cfg.py", root / "mdistiller/distillers/KD.py"
    cfg_file.write_text(
        cfg_file.read_text() + "CFG.KD.TEMPERATURE = [1, 2, 4]\nCFG.AT = CN()\nCFG.AT.P = 3\nCFG.FREE = CN()\n"
        "CFG.FREE.RATE = 1\n"
    )
    (root / "mdistiller/distillers/_common.py").write_text(
        "def width():\n    return 8\ndef p(cfg):\n    return cfg.AT.P\n"
    )
    (root / "configs/cifar100/kd.yaml").write_text(
        "DISTILLER: {TYPE: KD, TEACHER: tiny, STUDENT: tiny}\nFREE: {RATE: 2}\nKD: {TEMPERATURE: [1, 3]}\n"
    )
    plugin = ["EXPERIMENT.PLUGINS", f"['{root}']"]
    assert load(None, [*plugin, "DISTILLER.TYPE", "KD"]).KD.TEMPERATURE == [1, 2, 4]
    cfg = load(root / "configs/cifar100/kd.yaml", plugin)
    assert (cfg.KD.TEMPERATURE, cfg.AT.P, cfg.FREE.RATE) == ([1, 3], 3, 2) and kd_file.exists()
    assert "FREE.RATE (no method or model reads it)" in unread_overrides(cfg)
    with pytest.raises(ConfigError, match="FREE.RATES: unknown key"):
        load(root / "configs/cifar100/kd.yaml", [*plugin, "FREE.RATES", 1])
    load(None, [])
    assert load(None, ["DISTILLER.TYPE", "KD"]).KD.TEMPERATURE == 4
    with pytest.raises(ConfigError, match="KD.TEMPERATURE: must be a number"):
        load(None, ["KD.TEMPERATURE", "[1, 2]"])


def test_a_checkout_may_import_by_dotted_names(tmp_path):
    root = write_checkout(tmp_path)
    for name, imports, text in (
        ("distillers/QuietKD", "import mdistiller.distillers._base as base", "(base.Distiller)"),
        ("models/cifar/tiny", "import mdistiller.distillers._common", "mdistiller.distillers._common.width()"),
    ):
        file = root / f"mdistiller/{name}.py"
        lines = file.read_text().splitlines()
        lines = [imports if "_base import" in line or "_common import" in line else line for line in lines]
        file.write_text("\n".join(lines).replace("(Distiller)", text).replace("width()", text))
    cfg = load(root / "configs/cifar100/quiet.yaml", ["EXPERIMENT.PLUGINS", f"['{root}']"])
    assert step(cfg)[1]["loss"] > 0


def test_one_entry_that_is_no_class_or_fails_on_import_leaves_the_others(tmp_path):
    root = write_checkout(tmp_path)
    file = root / "mdistiller/distillers/__init__.py"
    text = (
        file.read_text()
        .replace("from .Heavy import Heavy", "from .Heavy import *")
        .replace("from .QuietKD import QuietKD", "from mdistiller.distillers.QuietKD import *")
    )
    file.write_text(text + "distiller_dict['MADE'] = lambda student, teacher, cfg: None\n")
    plugin = ["EXPERIMENT.PLUGINS", f"['{root}']"]
    assert step(load(root / "configs/cifar100/quiet.yaml", plugin))[1]["loss"] > 0
    for name, says in (("HEAVY", "HEAVY fails on import: ModuleNotFoundError"), ("MADE", "MADE cannot be chosen: ")):
        with refused(says, ConfigError):
            load(None, [*plugin, "DISTILLER.TYPE", name])


def test_a_checkouts_models_keep_their_names(tmp_path):
    """Another data set's model of a name that is taken, and names that differ from ours in their case alone."""
    root = write_checkout(tmp_path)
    with open(root / "mdistiller/models/cifar/__init__.py", "a") as file:
        file.write("cifar_model_dict |= {'resnet50': (tiny, None), 'ResNet50': (lambda num_classes: tiny(), None)}\n")
        file.write("tiny_imagenet_model_dict = {'tiny': (lambda num_classes: None, None), 'other': (tiny, None)}\n")
    (root / "mdistiller/models/__init__.py").write_text("from .cifar import *\n")
    pair = ["DISTILLER.TEACHER", "resnet50", "DISTILLER.STUDENT", "tiny", "DISTILLER.TYPE", "QUIETKD"]
    load(None, ["EXPERIMENT.PLUGINS", f"['{root}']", *pair])
    assert [registry.cifar_models[name][0].__name__ for name in ("tiny", "resnet50", "ResNet50", "other")] == [
        "tiny", "tiny", "<lambda>", "tiny",
    ]  # fmt: skip


def test_a_base_class_beside_the_file_is_its_own(tmp_path):
    (tmp_path / "_base.py").write_text(BASE + "\n    def own(self):\n        return 0\n")
    assert step(load(None, words(write_file(tmp_path, method("Own", "self.own()")), "OWN")))[1]["loss"] > 0


def test_a_hook_on_a_stage_sees_its_output_and_pre_activation(tmp_path):
    hook = """
    self.seen = []
    student.layer3.register_forward_hook(lambda module, inputs, output: self.seen.append(output))
    """
    looks = """
    logits, feats = self.student(image)
    out, preact = self.seen[-1]
    assert torch.equal(out, feats["feats"][-1]) and torch.equal(preact, feats["preact_feats"][-1])
    return logits, {"loss_ce": F.cross_entropy(logits, target)}
    """
    file = write_file(tmp_path, method("Hooked", hook, looks))
    for student in ("resnet8", "ShuffleV1", "ShuffleV2"):
        assert step(load(None, words(file, "HOOKED", "DISTILLER.STUDENT", student)))[1]["loss"] > 0


def test_what_only_the_checkout_has_is_looked_for_there(tmp_path):
    file = write_file(tmp_path, method("Lone", imports="from mdistiller.engine.utils import own_helper"))
    with pytest.raises(
        ConfigError, match="own_helper.*; if the file is part of a checkout, name the checkout's folder"
    ):
        load(None, ["EXPERIMENT.PLUGINS", str(file)])
    with refused("got 3 values"):
        step(load(None, words(write_file(tmp_path, method("Three", step=f"{STEP.rstrip()}, {{}}")), "THREE")))


@pytest.mark.parametrize("mistake", ["logits = logits.exp().add_(1)", "logits = self.kept = logits + self.kept"])
def test_losses_without_a_gradient_are_one_line(tmp_path, mistake):
    text = method("Wrong", "self.kept = 0", STEP.replace("return", f"{mistake}\nreturn"))
    cfg = load(None, words(write_file(tmp_path, text), "WRONG"))
    distiller = build_distiller(cfg, random_images(), None, torch.device("cpu")).train()
    run = Step(distiller, sgd(distiller.get_learnable_parameters(), 0.0, 0), torch.device("cpu"))
    set_lr(run.optimizer, 0.01)
    with pytest.raises(RunFailed, match="Wrong: no gradient of its losses: .*(inplace operation|second time)"):
        for _ in range(2):
            run(Batch(torch.rand(8, 3, 32, 32), torch.arange(8), torch.arange(8)), 1)


def test_the_table_counts_files_by_what_is_wrong_with_them(tmp_path):
    root = write_checkout(tmp_path)
    for number in range(3):
        (root / f"configs/{number}.yaml").write_text("DATASET: {TYPE: birds}\nDISTILLER: {TYPE: KD}\n")
    reasons = [trial.reason for trial in try_fork(root).files if "birds" in trial.reason]
    assert len(reasons) == 3 and len({*reasons}) == 1
