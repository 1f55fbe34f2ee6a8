"""Files from outside: methods as users of mdistiller have them, models, data sets and rules; what is wrong with one."""

import re
import textwrap
from types import SimpleNamespace

import forks
import pytest
import torch
from helpers import CPU, METHODS, ROOT, called, refused, save_teacher, script
from methods import batch, model
from sklearn.datasets import load_digits

import mdistiller as md
from mdistiller import config, registry
from mdistiller.config import computed, load
from mdistiller.dataset import load_dataset
from mdistiller.distillers import distiller_dict
from mdistiller.distillers._adapter import adapt
from mdistiller.distillers.CRD import CRD
from mdistiller.distillers.KD import KD
from mdistiller.engine.cfg import unread_overrides
from mdistiller.engine.method import prepare_parts
from mdistiller.errors import ConfigError, UserError
from mdistiller.registry import task_of
from mdistiller.runs.recorder import read_metrics


def test_a_file_with_an_entry_by_hand_runs_unchanged(tmp_path):
    """As users of mdistiller have them: relative imports, keys read as cfg.X, which the YAML alone gives."""
    plugin, path = tmp_path / "Hybrid.py", tmp_path / "x.yaml"
    entry = "\nfrom mdistiller.distillers import distiller_dict\ndistiller_dict['HYBRID'] = QuietKD\n"
    plugin.write_text(forks.METHODS["never registers"] + entry)
    path.write_text(
        f"EXPERIMENT: {{PLUGINS: [{plugin}]}}\nDISTILLER: {{TYPE: HYBRID, TEACHER: resnet14, STUDENT: resnet8}}\n"
        "QUIET: {WEIGHT: 5e-1, SIZES: [32, 32]}\n"
    )
    for _ in range(2):  # the same file may be loaded again
        cfg = load(path)
    assert (cfg.QUIET.WEIGHT, cfg.QUIET.SIZES) == (0.5, [32, 32])
    distiller = prepare_parts(distiller_dict["HYBRID"](model("resnet8"), model("resnet14"), cfg), CPU).train()
    with torch.autocast("cpu", torch.bfloat16):
        _, losses = distiller(**batch())
    assert all(value.dtype == torch.float32 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in distiller.get_learnable_parameters())


def test_pairs_reach_a_section_that_a_foreign_file_reads(tmp_path):
    (tmp_path / "reader.py").write_text("def build(cfg):\n    return cfg.READER.LOSS.WEIGHT, cfg.READER.SIZE\n")
    pairs = ["READER.LOSS.WEIGHT", "2.5", "READER.SIZE", "(32,32)", "READER.LOSS.MORE", "1"]
    cfg = load(None, ["EXPERIMENT.PLUGINS", str(tmp_path / "reader.py"), *pairs])
    assert (cfg.READER.LOSS.WEIGHT, cfg.READER.SIZE, cfg.READER.LOSS.MORE) == (2.5, (32, 32), 1)
    assert unread_overrides(cfg) == "no effect here: READER.LOSS.MORE (no method or model reads it)"
    with pytest.raises(ConfigError, match="SOLVER.WEIGHT: unknown key"):  # a word of the file, in another section
        load(None, ["EXPERIMENT.PLUGINS", str(tmp_path / "reader.py"), "SOLVER.WEIGHT", "1"])


def test_a_plugin_declares_its_own_section(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        textwrap.dedent("""
        '''Mine, a test.'''
        from mdistiller.distillers import Distiller, register_method

        @register_method("MINE_OWN", defaults={"T": 2.0, "LOSS": {"WEIGHT": 1.0}})
        class Mine(Distiller):
            needs_teacher = False
        """)
    )
    words = ["EXPERIMENT.PLUGINS", str(plugin), "DISTILLER.TYPE", "MINE_OWN"]
    cfg = load(None, [*words, "MINE_OWN.LOSS.WEIGHT", "3"])
    assert (cfg.MINE_OWN.T, cfg.MINE_OWN.LOSS.WEIGHT) == (2.0, 3.0)
    counted = computed(cfg)
    assert counted["MINE_OWN.LOSS.WEIGHT"] == 3.0 and "DISTILLER.TEACHER" not in counted
    with pytest.raises(ConfigError, match="did you mean MINE_OWN.LOSS.WEIGHT"):
        load(None, [*words, "MINE_OWN.LOSS.WEIHGT", "3"])
    with pytest.raises(ConfigError, match="MINE_OWN does not distil"):
        load(None, [*words, "SOLVER.TRAINER", "dot"])


def test_a_plugin_that_fails_is_one_line(tmp_path):
    for text, says in (
        ("from mdistiller.distillers import distiller_dict as d\nd['KD'] = 1", "the method KD must be a class"),
        ("from mdistiller.distillers import distiller_dict as d\nd['X'] = dict", "derived from mdistiller.distillers"),
        (
            "from mdistiller.distillers import *\n@register_method('Y')\nclass Y(Distiller): needs = ('width',)",
            "the method Y needs width; there are num_data and labels",
        ),
    ):
        plugin = tmp_path / "bad.py"
        plugin.write_text(text)
        with refused(says, ConfigError):
            load(None, ["EXPERIMENT.PLUGINS", f"['{plugin}']"])


def test_a_plugin_imports_the_package_as_anybody_does(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import mdistiller as md\nimport mdistiller.losses\nfrom mdistiller import UserError\n"
        "@md.register_model\ndef imported(num_classes):\n    raise UserError(mdistiller.losses.__name__)\n"
    )
    load(None, ["EXPERIMENT.PLUGINS", str(tmp_path / "mine.py")])
    with pytest.raises(UserError, match="mdistiller.losses"):
        registry.cifar_models["imported"][0](num_classes=2)


def test_the_task_of_a_data_set_goes_with_its_loader(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import mdistiller as md\nfrom mdistiller.dataset import load_dataset\n"
        "@md.register_dataset('text')\ndef images(root):\n    return load_dataset('digits', root)\n"
        "@md.register_dataset('digits', task='text')\ndef tokens(root): pass\n"
        "@md.register_dataset('poems', task='text')\ndef poems(root): pass\n"
    )
    load(None, ["EXPERIMENT.PLUGINS", str(tmp_path / "mine.py"), "DATASET.TYPE", "text"])
    assert [task_of(name) for name in ("text", "digits", "poems")] == ["classification", "text", "text"]
    with refused("set DATASET.TYPE digits or poems or python"):
        load(None, ["EXPERIMENT.PLUGINS", str(tmp_path / "mine.py"), "DISTILLER.STUDENT", "gpt2x64"])
    load()
    assert [task_of(name) for name in ("text", "digits")] == ["text", "classification"]
    with refused("set DATASET.TYPE python or text"):
        load(None, ["DISTILLER.STUDENT", "gpt2x64"])


@pytest.mark.parametrize("typed", ["[{0},{1}]", "[{0}, {1}]", "['{0}', '{1}']"])
def test_a_list_of_plugins_needs_no_inner_quotes(tmp_path, typed):
    files = [str(tmp_path / name) for name in ("a.py", "b.py")]
    for file in files:
        open(file, "w").close()
    (tmp_path / "x.yaml").write_text("EXPERIMENT: {PLUGINS: [a.py]}\n")
    assert load(tmp_path / "x.yaml", ["EXPERIMENT.PLUGINS", typed.format(*files)]).EXPERIMENT.PLUGINS == files
    assert load(tmp_path / "x.yaml", ["EXPERIMENT.PLUGINS", files[1]]).EXPERIMENT.PLUGINS == files[1:]


class Sniffed(CRD):
    def __init__(self, student, teacher, cfg, labels):
        super().__init__(student, teacher, cfg, 9)


class Renamed(KD):
    def forward_train(self, image, target, **kwargs):
        return super().forward_train(image, target, **kwargs)


class Declared(Renamed):
    takes_teacher_logits = True
    task_losses = ("loss_kd",)


class Unchanged(CRD):
    pass


def test_what_a_plugin_does_not_declare_is_read_off_its_signatures():
    assert adapt("A", Sniffed).needs == ("labels",)
    assert adapt("B", Unchanged).needs == ("num_data", "labels")
    assert adapt("C", Renamed).takes_teacher_logits is False
    names = ("ce", "loss_ce", "ce_weak", "loss_once", "loss_kd")
    assert [name in adapt("D", Renamed).task_losses for name in names] == [True, True, True, False, False]
    declared = adapt("E", Declared)
    assert declared.takes_teacher_logits and declared.task_losses == ("loss_kd",) and declared.needs == ()
    for name in METHODS:
        before = dict(vars(distiller_dict[name]))
        assert dict(vars(adapt(name, distiller_dict[name]))) == before, "ours declare themselves"


def test_a_data_set_that_is_none_is_refused(monkeypatch):
    monkeypatch.setitem(registry.datasets.data, "odd", lambda root: (1, 2))
    with pytest.raises(UserError, match="the data set odd must be an ImageSet, which image_set makes; got tuple"):
        load_dataset("odd", ".")


def blocks(page):
    """{file name: text} of every code block that a line `name.py`: announces."""
    return dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)```", (ROOT / page).read_text(), re.M | re.S))


def write(folder, page, expected):
    files = blocks(page)
    assert set(files) == expected
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.fixture
def fewer_digits(monkeypatch):
    """There are but 100 of them."""
    data = load_digits()
    few = SimpleNamespace(images=data.images[:100], target=data.target[:100])
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: few)


@pytest.mark.parametrize("method", ["CONFIDENCE_KD", "HINT"])
def test_the_page_on_new_methods_runs_as_it_stands(tmp_path, fewer_digits, method):
    write(tmp_path, "docs/new_method.md", {"confidence_kd.py", "confidence_kd.yaml", "hint.py", "notebook.py"})
    words = ["DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT", save_teacher(tmp_path / "teacher.pth")]
    if method == "HINT":
        words += ["EXPERIMENT.PLUGINS", "['confidence_kd.py', 'hint.py']", "DISTILLER.TYPE", "HINT"]
    words += ["EXPERIMENT.NAME", "x", "SOLVER.EPOCHS", 1, "SOLVER.LR_DECAY_STAGES", "[]"]
    done = called("train_ours", "--cfg", "confidence_kd.yaml", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = read_metrics(tmp_path / "output" / "distill" / "x")
    assert row["train_losses"]["loss/loss_kd"] > 0


@pytest.mark.parametrize(
    ("change", "words", "says"),
    [
        (("", ""), ("CONFIDENCE_KD.KD_WIGHT", 3), "unknown key; did you mean CONFIDENCE_KD.KD_WEIGHT?"),
        (
            ("self.cfg.KD_WEIGHT", "self.cfg.KD_WEIHT"),
            (),
            "reads the key KD_WEIHT, which nothing sets; did you mean KD_W",
        ),
        (
            ("kd = ", "kd = [] + "),
            (),
            "the first training step of CONFIDENCE_KD fails at confidence_kd.py:25: TypeError",
        ),
        (
            ("kd = ", "kd = 1 / (2 - kwargs['epoch']) * "),
            (),
            "a training step of CONFIDENCE_KD fails at confidence_kd.py",
        ),
    ],
)
def test_a_mistake_in_a_method_is_a_line_and_leaves_nothing_of_a_run_that_never_trained(
    tmp_path, fewer_digits, change, words, says
):
    write(tmp_path, "docs/new_method.md", {"confidence_kd.py", "confidence_kd.yaml", "hint.py", "notebook.py"})
    file = tmp_path / "confidence_kd.py"
    file.write_text(file.read_text().replace(*change))
    words += ("DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT", save_teacher(tmp_path / "teacher.pth"))
    words += ("SOLVER.EPOCHS", 2, "SOLVER.LR_DECAY_STAGES", "[]")
    done = called("train_ours", "--cfg", "confidence_kd.yaml", *words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") <= 2 and says in done.stderr.replace("\n  ", " "), (
        done.stderr
    )
    assert (tmp_path / "output").exists() == says.startswith("a training step")


def test_the_page_on_plugins_runs_as_it_stands(tmp_path):
    files = ("small_net.py", "staged_net.py", "squares.py", "confidence.py", "squares.yaml", "notebook.py")
    write(tmp_path, "docs/plugins.md", {*files})
    (tmp_path / "notebook.py").unlink()  # it is no plug-in
    done = called("train_ours", "--cfg", "squares.yaml", "SOLVER.EPOCHS", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = read_metrics(tmp_path / "output" / "distill" / "confidence,small+SOLVER.EPOCHS:1")
    assert row["train_losses"]["loss/loss_kd"] > 0
    the_tools_know_what_it_brings(tmp_path, tmp_path / "output" / "distill" / "confidence,small+SOLVER.EPOCHS:1")
    code = """
        import torch, mdistiller as md
        from mdistiller.config import load
        from mdistiller.dataset import load_dataset
        from mdistiller.distillers import distiller_dict
        from mdistiller.engine.method import build_distiller
        given = ["EXPERIMENT.PLUGINS", "['small_net.py', 'staged_net.py', 'squares.py']", "CRD.NCE.K", 8]
        given += ["DATASET.TYPE", "squares", "DISTILLER.STUDENT", "StagedNet", "DISTILLER.TEACHER"]
        load(None, [*given, "StagedNet"])
        data = load_dataset("squares", ".")
        for name in METHODS:
            needed = distiller_dict[name].needs_features
            for teacher in ("StagedNet", "SmallNet") if needed else ("SmallNet",):
                cfg = load(None, [*given, teacher, "DISTILLER.TYPE", name])
                try:
                    method = build_distiller(cfg, data, None, torch.device("cpu"))
                except md.UserError as error:
                    print(error)
                    continue
                batch = {"image": torch.randn(4, 3, 32, 32), "target": torch.arange(4), "index": torch.arange(4)}
                losses = method.train()(**batch, epoch=1)[1]
                assert all(loss.isfinite() for loss in losses.values()), name
    """
    done = script(f"{METHODS = }\n{textwrap.dedent(code)}", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = r"^(\w+) compares features, and the model SmallNet does not give (.*?);"
    needs = {name: ", ".join(cls.needs_features) for name in METHODS if (cls := distiller_dict[name]).needs_features}
    assert dict(re.findall(lines, done.stdout, re.M)) == needs


def the_tools_know_what_it_brings(folder, run):
    """In the folder of the plug-ins without a word, elsewhere with --plugins, whose lack they name."""
    (folder / "elsewhere").mkdir()
    for cwd, more in ((folder, []), (folder / "elsewhere", ["--plugins", *sorted(folder.glob("*.py"))])):
        done = called("analyze", run, "-o", cwd / "report", *more, cwd=cwd)
        assert done.returncode == 0 and "not known here" not in done.stdout, done.stdout + done.stderr
        assert (cwd / "report" / "figures" / "calibration.csv").exists()
        assert "t-SNE: its networks give no pooled_feat" in done.stdout
    done = called("compare", run, cwd=folder / "elsewhere")
    assert "squares.py is neither in this folder nor in the run's; type --plugins PATH/squares.py" in done.stderr
    assert done.returncode == 0 and "squares" in done.stdout
    words = ["-m", "SmallNet", "-c", run / "student_latest", "-d", "squares"]
    done = called("eval", *words, cwd=folder)
    assert done.returncode == 2 and "what a plug-in brings needs --plugins FILE" in done.stderr
    done = called("eval", *words, "--plugins", folder / "small_net.py", folder / "squares.py", cwd=folder / "elsewhere")
    assert done.returncode == 0 and "top-1" in done.stdout, done.stderr
    by_run = called("eval", "-r", run, "--plugins", *sorted(folder.glob("*.py")), cwd=folder / "elsewhere")
    assert by_run.returncode == 0 and "student, best" in by_run.stdout, by_run.stderr
    assert "top-5" not in done.stdout and "test_acc_top5" not in (run / "metrics.jsonl").read_text(), "of four classes"


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("docs/new_method.md", "{'loss/loss_ce': "),
        ("docs/plugins.md", " 8.0"),
        ("docs/api.md", "MY_METHOD: ResNet -> my_net on my_digits"),
    ],
)
def test_a_pages_notebook_runs_as_it_stands(tmp_path, request, page, says):
    if page != "docs/api.md":  # which takes 400 of them itself
        request.getfixturevalue("fewer_digits")
    done = script(blocks(page)["notebook.py"], tmp_path)
    assert done.returncode == 0 and says in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_table_of_checks_has_all_that_the_library_gives():
    rows = re.findall(r"^\| `(\w+)[^|]*` \| ", (ROOT / "docs/new_method.md").read_text(), re.M)
    known = {name for name in md.__all__ if name in config.__all__}
    assert {row for row in rows if row in known} == known - {"Key"}


def test_the_page_on_plugins_says_what_methods_read():
    rows = re.findall(r"^\| `(?:feats\[\")?(\w+).*?` \|.*\| (.*) \|$", (ROOT / "docs/plugins.md").read_text(), re.M)
    table = {part: re.findall(r"[A-Z]{2,}", methods) for part, methods in rows}
    assert table.pop("get_bn_before_relu") == ["OFD"]
    for part, methods in table.items():
        assert methods == sorted(name for name in METHODS if part in distiller_dict[name].needs_features), part


def test_a_cell_of_a_notebook_may_run_again(tmp_path):
    code = """
        import mdistiller as md
        from mdistiller.config import Key
        from mdistiller.distillers import Distiller, distiller_dict
        from mdistiller.models import cifar_model_dict

        def cell(default):
            exec('''
        @md.register_method("CELL", defaults={"T": default})
        class Cell(Distiller): pass
        @md.register_model
        def cell_net(num_classes): return default
        @md.register_rule("cell", defaults={"SHARE": default})
        def cell_rule(v, u, tau, share): return share
        ''', globals() | {"default": default})

        cell(1.0)
        cell(2.0)
        assert md.load_config(None, {"CELL.T": 3}).CELL.T == 3.0 and md.load_config().CELL.T == 2.0
        assert cifar_model_dict["cell_net"][0](num_classes=3) == 2.0
        assert md.load_config().TEMPERATURE.CELL.SHARE == 2.0
        try:
            md.register_method("KD")(distiller_dict["CELL"])
        except ValueError as error:
            print(error)
    """
    done = script(textwrap.dedent(code).replace("\n        ", "\n"), tmp_path)
    assert done.returncode == 0 and "method 'KD' is registered already" in done.stdout, done.stderr
