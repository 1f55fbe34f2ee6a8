"""Configurations: their defaults, what may be given, and lines that say what to type instead."""

import os
import re

import pytest
import torch
from helpers import ROOT

from mdistiller.config import KEYS, Key, computed, leaves
from mdistiller.distillers import distiller_dict
from mdistiller.engine.cfg import CFG, describe, load, unread_overrides
from mdistiller.engine.teachers import teacher_config
from mdistiller.errors import ConfigError
from mdistiller.models import build_model
from mdistiller.registry import Registry
from mdistiller.runs.folder import run_folder

METHODS = dict(distiller_dict.own)
OWN = dict(KEYS)  # before a test's plug-in adds some
SEED_DEFAULTS = {
    "EXPERIMENT.PROJECT": "distill", "EXPERIMENT.NAME": "", "EXPERIMENT.TAG": "default", "DATASET.TYPE": "cifar100",
    "DATASET.NUM_WORKERS": 2, "DATASET.TEST.BATCH_SIZE": 64, "DISTILLER.TYPE": "NONE",
    "DISTILLER.TEACHER": "ResNet50", "DISTILLER.STUDENT": "resnet32", "SOLVER.TRAINER": "base",
    "SOLVER.BATCH_SIZE": 64, "SOLVER.EPOCHS": 240, "SOLVER.LR": 0.05, "SOLVER.LR_DECAY_STAGES": [150, 180, 210],
    "SOLVER.LR_DECAY_RATE": 0.1, "SOLVER.WEIGHT_DECAY": 0.0001, "SOLVER.MOMENTUM": 0.9, "SOLVER.TYPE": "SGD",
    "LOG.TENSORBOARD_FREQ": 500, "LOG.SAVE_CHECKPOINT_FREQ": 40, "LOG.PREFIX": "./output", "LOG.WANDB": False,
    "KD.TEMPERATURE": 4.0, "KD.LOSS.CE_WEIGHT": 0.1, "KD.LOSS.KD_WEIGHT": 0.9, "DTKD.ALPHA": 3.0, "DTKD.BETA": 1.0,
    "DTKD.CE_WEIGHT": 1.0, "DTKD.T": 4.0, "DTKD.WARMUP": 20,
}  # fmt: skip


def problems(path=None, opts=()):
    """The lines that refuse it, which are few, short and printable."""
    with pytest.raises(ConfigError) as caught:
        load(path, opts)
    lines = list(caught.value.lines)
    assert 0 < len(lines) <= 21 and all(line.isprintable() and len(line) <= 1000 for line in lines)
    return lines


def write(folder, text, name="x.yaml"):
    (folder / name).write_text(text)
    return folder / name


def test_defaults_are_the_seeds():
    flat = leaves(CFG)
    assert {key: flat[key] for key in SEED_DEFAULTS} == SEED_DEFAULTS


def test_yaml_then_overrides(tmp_path):
    path = write(tmp_path, "SOLVER:\n  LR: 1\n  WEIGHT_DECAY: 5e-4\nDTKD:\n  T: 4\nKD: {TEMPERATURE: 3}\n")
    cfg = load(path, ["SOLVER.EPOCHS", "3", "SOLVER.LR_DECAY_STAGES", "[1,2]", "EXPERIMENT.TAG", "7"])
    assert (cfg.SOLVER.LR, cfg.SOLVER.WEIGHT_DECAY, cfg.DTKD.T, cfg.KD.TEMPERATURE) == (1.0, 5e-4, 4.0, 3.0)
    assert type(cfg.SOLVER.LR) is float
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.LR_DECAY_STAGES, cfg.EXPERIMENT.TAG) == (3, [1, 2], "7")
    assert CFG.SOLVER.EPOCHS == 240 and load(write(tmp_path, "", "empty.yaml")) == load()
    assert cfg.overrides[0] == ("SOLVER.EPOCHS", "3") and len(cfg.clone().overrides) == 3 and not CFG.overrides
    with pytest.raises(AttributeError):
        cfg.SOLVER.LR = 3.0  # frozen


ITS_METHODS = "NONE KD DKD AT NST PKT RKD SP FITNET VID OFD KDSVD CRD REVIEWKD".split()


@pytest.mark.parametrize("method", ITS_METHODS)
def test_mdistillers_files_for_cifar100_load_as_they_are(tmp_path, method):
    """Files of its form, for each of its methods and trainers."""
    more = {
        "CRD": ['  TRAINER: "crd" '],
        "KD": ['  TRAINER: "dot"', "  DOT:", "    DELTA: 0.075"],
        "DKD": ["DKD:", "  BETA: 6.0"],
        "REVIEWKD": ["REVIEWKD:", "  REVIEWKD_WEIGHT: 5.0"],
    }.get(method, [])
    lines = f"""
EXPERIMENT:
  NAME: ""
  TAG: "{method.lower()},res32x4,res8x4"
  PROJECT: "cifar100_baselines"
DISTILLER:
  TYPE: "{method}"
  TEACHER: "resnet32x4"
  STUDENT: "resnet8x4"
SOLVER:
  BATCH_SIZE: 64
  EPOCHS: 240
  LR: 0.05
  LR_DECAY_STAGES: [150, 180, 210]
  LR_DECAY_RATE: 0.1
  WEIGHT_DECAY: 0.0005
  MOMENTUM: 0.9
  TYPE: "SGD"
"""
    cfg = load(write(tmp_path, lines + "\n".join(more)))
    assert cfg.DISTILLER.TYPE.upper() == method and cfg.SOLVER.WEIGHT_DECAY == 5e-4
    given = {"KD": cfg.SOLVER.DOT.DELTA, "DKD": cfg.DKD.BETA, "REVIEWKD": cfg.REVIEWKD.REVIEWKD_WEIGHT}
    assert given.get(method) == {"KD": 0.075, "DKD": 6.0, "REVIEWKD": 5.0}.get(method)
    assert cfg.SOLVER.TRAINER == {"KD": "dot", "CRD": "crd"}.get(method, "base")


def test_off_is_a_word_where_it_is_a_choice(tmp_path):
    path = write(tmp_path, "TEACHER_BANK: off\nLOG: {TEMPERATURE: OFF, WANDB: off}\n")
    cfg = load(path)
    assert (cfg.TEACHER_BANK, cfg.LOG.TEMPERATURE, cfg.LOG.WANDB) == ("off", "off", False)
    assert load(None, ["TEACHER_BANK", "False"]).TEACHER_BANK == "off", "as a plan of a campaign hands it on"
    assert len(problems(write(tmp_path, "TEACHER_BANK: on\nSOLVER: {STEP: off}\n"))) == 2


def test_the_trees_own_merge_methods_follow_the_same_rules(tmp_path):
    cfg = CFG.clone()
    cfg.merge_from_file(write(tmp_path, "KD: {TEMPERATURE: 3}"))
    cfg.merge_from_list(["SOLVER.LR", 1])
    cfg.merge_from_other_cfg(load(None, ["SEED", "9"]))
    assert (cfg.KD.TEMPERATURE, cfg.SOLVER.LR, cfg.SEED) == (4.0, 0.05, 9)  # the last one holds every key
    with pytest.raises(ConfigError, match=r"did you mean SOLVER\.LR\?"):
        cfg.merge_from_list(["SOLVER.LRR", 1])
    cfg.freeze()
    with pytest.raises(AttributeError):
        cfg.merge_from_list(["SOLVER.LR", 1])


def test_base_files_inherit_and_cycles_are_named(tmp_path):
    write(tmp_path, "SOLVER: {LR: 0.2, EPOCHS: 7}", "a.yaml")
    write(tmp_path, "_BASE_: a.yaml\nSOLVER: {EPOCHS: 9}", "b.yaml")
    cfg = load(write(tmp_path, "_BASE_: [a.yaml, b.yaml]\nSEED: 4", "c.yaml"))
    assert (cfg.SOLVER.LR, cfg.SOLVER.EPOCHS, cfg.SEED) == (0.2, 9, 4)
    assert "_BASE_ leads back" in problems(write(tmp_path, "_BASE_: d.yaml", "d.yaml"))[0]
    for path in (write(tmp_path, "_BASE_: gone.yaml", "e.yaml"), tmp_path, tmp_path / "gone.yaml"):
        assert "cannot be read" in problems(path)[0]


@pytest.mark.parametrize(
    "typed",
    [
        ["SOLVER.LR=0.3", "SOLVER.LR_DECAY_STAGES=[7,10]", "LOG.PREFIX=a=b"],
        ["SOLVER.LR", "0.3", "SOLVER.LR_DECAY_STAGES", "[7,", "10]", "LOG.PREFIX", "a=b"],
        ["SOLVER.LR", 0.3, "SOLVER.LR_DECAY_STAGES=[7,", "10", "]", "LOG.PREFIX", "a=b"],
    ],
)
def test_pairs_may_be_typed_with_an_equals_sign_and_lists_with_spaces(typed):
    cfg = load(None, typed)
    assert (cfg.SOLVER.LR, cfg.SOLVER.LR_DECAY_STAGES, cfg.LOG.PREFIX) == (0.3, [7, 10], "a=b")
    assert [key for key, _ in cfg.overrides] == ["SOLVER.LR", "SOLVER.LR_DECAY_STAGES", "LOG.PREFIX"]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("SOLVER.SCHEDULER", "SOLVER.LR_DECAY_STAGES"),
        ("SCHEDULER.TYPE", "SCHEDULER: unknown section; SOLVER.SCHEDULE is multistep"),
        ("SOLVER.COSINE", "SOLVER.SCHEDULE is multistep"),
        ("SOLVER.EMA_DECAY", "SOLVER.EMA, such as 0.999"),
        ("MODEL_EMA", "SOLVER.EMA, such as 0.999"),
        ("DATASET.NUM_CLASSES", "the data say how many classes"),
        ("GPU_ID", "DEVICE cuda"),
        ("SOLVER.OPTIMIZER", "SOLVER.TYPE"),
    ],
)
def test_a_key_of_other_frameworks_is_answered_with_what_serves_its_purpose(key, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        load(None, [key, "1"])
    assert len(caught.value.lines) == 1 and "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("opts", "key", "says"),
    [
        (["SOLVER.LRR", "0.1"], "SOLVER.LRR", "did you mean SOLVER.LR?"),
        (["solver.epochs", "3"], "solver", "did you mean SOLVER?"),
        (["LR", "0.1"], "LR", "did you mean SOLVER.LR?"),
        (["SOLVER.SEED", "1"], "SOLVER.SEED", "did you mean SEED?"),
        (["SOLVER.MIXUP", "1"], "SOLVER.MIXUP", "did you mean DATASET.MIXUP?"),
        (["SOLVER", "3"], "SOLVER", "is a section"),
        (["SOLVER.LR.X", "3"], "SOLVER.LR", "single value"),
        (["SOLVER.EPOCHS", "2.5"], "SOLVER.EPOCHS", "a whole number"),
        (["LOG.WANDB", "1"], "LOG.WANDB", "True or False"),
        (["SOLVER.LR_DECAY_STAGES", "[1.5]"], "SOLVER.LR_DECAY_STAGES", "a list"),
        (["SOLVER.LR_DECAY_STAGES", "[180,150]"], "SOLVER.LR_DECAY_STAGES", "rising order"),
        (["SOLVER.LR", "1e999"], "SOLVER.LR", "finite"),
        (["SOLVER.EPOCHS", "0"], "SOLVER.EPOCHS", "at least 1"),
        (["SOLVER.MOMENTUM", "1"], "SOLVER.MOMENTUM", "[0, 1)"),
        (["SOLVER.AMP", "bf61"], "SOLVER.AMP", "did you mean bf16?"),
        (["SOLVER.TYPE", "Adam"], "SOLVER.TYPE", "did you mean AdamW?"),
        (["DEVICE", "gpu"], "DEVICE", "cuda"),
        (["SEED", "-1"], "SEED", "[0, 2**32)"),
        (["DISTILLER.TYPE", "dtkx"], "DISTILLER.TYPE", "did you mean DTKD?"),
        (["KD.TEMPERATURE", "0"], "KD.TEMPERATURE", "greater than 0"),
        (["MLKD.TEMPERATURES", "[2, 0]"], "MLKD.TEMPERATURES", "greater than 0"),
        (["FITNET.INPUT_SIZE", "[0, 0]"], "FITNET.INPUT_SIZE", "two sizes"),
        (["SOLVER.TRAINER", "dot"], "SOLVER.TRAINER", "set SOLVER.TRAINER base"),
        (["DTKD.WARMUP", "-1"], "DTKD.WARMUP", "0 or more"),
        (["EXPERIMENT.NAME", "../../x"], "EXPERIMENT.NAME", "below LOG.PREFIX"),
        (["EXPERIMENT.PLUGINS", "gone.py"], "EXPERIMENT.PLUGINS", "neither an existing .py file nor a folder"),
        (["SOLVER.LR"], "command line", "has no value"),
        (["--lr", "3"], "command line", "KEY VALUE"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_type(opts, key, says):
    (line,) = problems(opts=opts)
    assert line.startswith(key), line
    assert says in line


def test_every_check_passes_its_default_and_says_what_it_wants():
    for name, key in OWN.items():
        assert key.doc and (key.check is None or key.check.problem(key.default) is None), name
        if key.check and key.check.names is None:
            assert key.check.wanted.startswith("must "), name


def test_what_is_computed_is_a_runs_identity():
    """Neither places nor ways, nor what nothing reads; a key that is not given has its default."""

    def same(one, other):
        return computed(load(None, one)) == computed(load(None, other))

    kd = ["DISTILLER.TYPE", "KD"]
    assert same(kd, [*kd, "LOG.PREFIX", "/x", "DEVICE", "cuda", "SOLVER.STEP", "eager", "DATASET.TEST.BATCH_SIZE", "1"])
    assert same(kd, [*kd, "TEACHER_BANK", "full"]) and not same(kd, [*kd, "TEACHER_BANK", "off"])
    assert same([], ["DISTILLER.TEACHER", "resnet20", "TEMPERATURE.RULE", "std"]), "there is no teacher"
    assert not same(kd, [*kd, "DISTILLER.TEACHER", "resnet20"])
    assert same(kd, [*kd, "DATASET.ROOT", "/x"])
    npz = [*kd, "DATASET.TYPE", "npz", "DATASET.ROOT"]
    assert not same([*npz, "a.npz"], [*npz, "b.npz"]), "the images are that file"
    assert computed({"DISTILLER": {"TYPE": "KD"}}) == computed(load(None, kd))


@pytest.mark.parametrize(
    ("run", "pairs", "why"),
    [
        ("DISTILLER.TYPE DTKD", "AT.P 3", "DTKD does not read it"),
        ("DISTILLER.TYPE NORMKD", "KD.TEMPERATURE 3", "NORMKD does not read it"),
        ("DISTILLER.TYPE WTTM", "TTM.BETA 3", "WTTM does not read it"),
        ("DISTILLER.TYPE CTKD", "KD.LOSS.KD_WEIGHT 3", "CTKD does not read it"),
        ("DISTILLER.TYPE CTKD", "KD.TEMPERATURE 3", ""),
        ("DISTILLER.TYPE AT", "TEACHER_BANK off", "AT compares more than logits"),
        ("DISTILLER.TYPE AT", "TEMPERATURE.DETACH True", "AT takes no temperature rule"),
        ("DISTILLER.TYPE DKD", "TEMPERATURE.SHARPNESS.MARGIN 0.1", "the temperature rule is fixed"),
        ("DISTILLER.TYPE DKD TEMPERATURE.RULE sharpness", "TEMPERATURE.SHARPNESS.MARGIN 0.1", ""),
        ("DISTILLER.TYPE NONE", "DISTILLER.TEACHER_LR 1", "NONE has no teacher"),
        ("DATASET.TYPE digits", "DATASET.TEXT.BLOCK 8", "DATASET.TYPE is digits"),
        ("DATASET.TYPE digits", "DATASET.SCENES.TRAIN 9", "DATASET.TYPE is digits"),
        ("DATASET.TYPE digits", "DATASET.JITTER [0.5,1]", "DATASET.TYPE is digits"),
        ("DATASET.TYPE scenes DISTILLER.STUDENT fasterrcnn_resnet8", "DATASET.JITTER [0.5,1]", ""),
        (
            "DATASET.TYPE scenes DISTILLER.STUDENT fasterrcnn_resnet8",
            "DATASET.BAD_BOXES drop",
            "DATASET.TYPE is scenes",
        ),
        ("DATASET.TYPE python DISTILLER.STUDENT gpt1x32", "DATASET.TEXT.BLOCK 8", ""),
        ("SOLVER.SCHEDULE cosine", "SOLVER.LR_DECAY_RATE 0.2", "SOLVER.SCHEDULE is cosine"),
        ("DISTILLER.TYPE KD", "SOLVER.DOT.DELTA 0.1", "SOLVER.TRAINER is base"),
        ("DISTILLER.TYPE KD SOLVER.TRAINER crd_dot", "SOLVER.DOT.DELTA 0.09", ""),
    ],
)
def test_what_nothing_reads_is_told_and_is_in_no_name_and_no_identity(run, pairs, why, tmp_path):
    before, cfg = load(None, run.split()), load(None, [*run.split(), *pairs.split(), "LOG.PREFIX", str(tmp_path)])
    key = pairs.split()[0]
    assert unread_overrides(cfg) == (f"no effect here: {key} ({why})" if why else "")
    assert (computed(before) == computed(cfg)) == bool(why)
    assert (key in run_folder(cfg).name) != bool(why)
    old = run_folder(before).name + ("," if "+" in run_folder(before).name else "+") + pairs.replace(" ", ":")
    (tmp_path / "distill" / old).mkdir(parents=True)
    (tmp_path / "distill" / old / "latest").touch()
    assert run_folder(cfg).name == old, "a run of before is found under its name"


def test_what_a_method_from_outside_may_read_is_a_part_of_its_identity(tmp_path):
    """Of a plug-in's the sections that it names, or that what it asks for needs."""
    (tmp_path / "mine.py").write_text(
        "from mdistiller.distillers import register_method\nfrom mdistiller.distillers.KD import KD\n"
        "@register_method('MINE')\nclass Mine(KD):\n    def losses(self, *given, **kwargs): pass\n"
    )
    mine = ["EXPERIMENT.PLUGINS", str(tmp_path / "mine.py"), "DISTILLER.TYPE", "MINE"]
    for pairs, told in ((["KD.TEMPERATURE", "3"], False), (["AT.P", "3"], True)):
        cfg = load(None, [*mine, *pairs])
        assert bool(unread_overrides(cfg)) == told == (computed(cfg) == computed(load(None, mine)))
    (tmp_path / "mine.py").write_text(
        "from mdistiller.distillers._base import Distiller\nclass Mine(Distiller):\n"
        "    def forward_train(self, image, target, contrastive_index, **kwargs): pass\n"
    )
    assert not unread_overrides(load(None, [*mine, "CRD.NCE.K", "3"]))
    assert "AT.P" in unread_overrides(load(None, [*mine, "AT.P", "3"]))


def test_a_key_that_is_added_later_makes_no_teacher_another_one(monkeypatch):
    cfg = load(None, ["DISTILLER.TYPE", "KD"])
    name = teacher_config(cfg).EXPERIMENT.NAME
    monkeypatch.setitem(KEYS, "SOLVER.LOOKAHEAD", Key(0))
    monkeypatch.setitem(CFG.SOLVER, "LOOKAHEAD", 0)
    assert teacher_config(load(None, ["DISTILLER.TYPE", "KD"])).EXPERIMENT.NAME == name
    assert teacher_config(load(None, ["DISTILLER.TYPE", "KD", "SOLVER.LOOKAHEAD", "5"])).EXPERIMENT.NAME != name


def test_the_methods_that_a_key_names_are_those_that_read_it():
    for key, readers in (
        ("TEMPERATURE.RULE", {name for name, cls in METHODS.items() if hasattr(cls, "own_rule")}),
        ("TEMPERATURE.PART", {name for name, cls in METHODS.items() if cls.has_parts}),
        ("DIVERGENCE.TYPE", {name for name, cls in METHODS.items() if cls.takes_divergence}),
    ):
        assert {*re.findall(r"\b[A-Z]+KD\b|\bKD\b|\bDIST\b", KEYS[key].doc)} - {"TCKD", "NCKD"} == readers


def test_a_record_without_a_later_key_is_what_it_was_computed_with():
    """RLD had no warm-up once, and one temperature: such a record is another run than one by today's defaults."""
    rld = ["DISTILLER.TYPE", "RLD"]
    before, now = computed({"DISTILLER": {"TYPE": "RLD"}}), computed(load(None, rld))
    assert {key: (value, now[key]) for key, value in before.items() if value != now[key]} == {
        "RLD.WARMUP": (0.0, 20),
        "RLD.ALPHA_T": (0.0, 1.0),
    }
    assert before == computed(load(None, [*rld, "RLD.WARMUP", "0", "RLD.ALPHA_T", "0"]))


def test_all_mistakes_come_together():
    lines = problems(opts=["SOLVER.LRR", "1", "SOLVER.EPOCHS", "0", "DISTILLER.TYPE", "KDD", "SEED", "x"])
    assert [line.split(":")[0] for line in lines] == ["SOLVER.LRR", "SEED", "DISTILLER.TYPE", "SOLVER.EPOCHS"]


# What a YAML file may hold: plain keys and values, each once, within limits

BAD = {
    "tab": "SOLVER:\n\tLR: 1",
    "unclosed": "SOLVER: {LR: 1",
    "a key twice": "SOLVER: {LR: 1, LR: 2}",
    "a Python object": "!!python/object/apply:os.mkdir ['bomb']",
    "an unknown tag": "SOLVER: !mine {LR: 1}",
    "an alias": "SEED: &n 4\nCRD: {FEAT: {DIM: *n}}",
    "a merge of an alias": "DKD: &d {T: 3.0}\nDTKD: {<<: *d, ALPHA: 5.0}",
    "an alias of nothing": "SOLVER: *gone",
    "a merge of text": "SOLVER: {<<: text}",
    "a deep list": "[" * 1500,
    "a deep map": "{a: " * 1500,
    "Latin 1": b"EXPERIMENT: {TAG: \xe9}",
    "a NUL": b"SOLVER: {LR: 1}\0",
    "a control character": "EXPERIMENT: {TAG: a\x07b}",
    "two documents": "SEED: 1\n---\nSEED: 2",
    "a number as key": "1: 2",
    "a list as key": "? [a, b]\n: 2",
    "a list": "- SOLVER",
    "bytes": "EXPERIMENT: {TAG: !!binary aGVsbG8=}",
    "5,000 digits": f"SEED: {'1' * 5000}",
    "another YAML": "%YAML 9.9\n---\nSEED: 1",
    "a _BASE_ that is a folder": "_BASE_: .",
    "a _BASE_ that is a device": "_BASE_: /dev/zero",
    "a _BASE_ that is missing": "_BASE_: gone.yaml",
    "a _BASE_ that is a number": "_BASE_: 5",
    "a _BASE_ that is a map": "_BASE_: {a: b}",
    "a _BASE_ of itself": "_BASE_: ./././x.yaml",
    "a _BASE_ with a NUL": '_BASE_: "a\\0b"',
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_bytes(BAD[case].encode() if isinstance(BAD[case], str) else BAD[case])
    lines = problems("x.yaml")
    assert any("x.yaml" in line or "TAG" in line for line in lines), lines
    assert case != "a key twice" or "line 1, column 9: key 'LR' is given twice" in lines[0]
    assert case != "an alias" or ("*n" in lines[0] and "write its value out" in lines[0])
    assert os.listdir(tmp_path) == ["x.yaml"]


def test_many_mistakes_are_few_lines(tmp_path):
    path = write(tmp_path, "\n".join(f"key{i}: 1" for i in range(60)))
    assert problems(path)[-1] == "and 40 more of this kind"


def test_a_date_is_the_text_that_it_is(tmp_path):
    cfg = load(write(tmp_path, "EXPERIMENT: {TAG: 2024-01-01, NAME: 4:00}"))
    assert (cfg.EXPERIMENT.TAG, cfg.EXPERIMENT.NAME) == ("2024-01-01", "4:00")


VALUES = [
    ("SEED", "2024-01-01"),
    ("SOLVER.LR_DECAY_STAGES", f"[{10**40}]"),
    ("SOLVER.LR_DECAY_STAGES", "[{a: 1}]"),
    ("SOLVER.LR", "1.0e+60"),
    ("SOLVER.LR", ".nan"),
    ("SOLVER", "[1, 2]"),
    ("SOLVER.BATCH_SIZE", str(10**30)),
    ("DATASET.TEST", "yes please"),
    ("DATASET.TEST.BATCH_SIZE", str(2**63 - 1)),
    ("DATASET.ROOT", r'"a\0b"'),
    ("DATASET.ROOT", "~nosuchuser/x"),
    ("CRD.NCE.K", str(10**9)),
    ("FITNET.INPUT_SIZE", "[100000, 100000]"),
    ("MLKD.TEMPERATURES", "[1.0, .nan]"),
    ("MLKD.TEMPERATURES", "[]"),
    ("EXPERIMENT.NAME", r'"\uD800"'),
    ("EXPERIMENT.TAG", r'"\e[31mred"'),
    ("EXPERIMENT.PROJECT", "a/../../x"),
    ("EXPERIMENT.PLUGINS", "[[a]]"),
]


def test_a_bad_value_is_named_by_its_key(tmp_path):
    for key, value in VALUES + [(key, "null") for key in leaves(CFG)]:
        *sections, last = key.split(".")
        text = "".join(f"{' ' * i}{name}:\n" for i, name in enumerate(sections))
        lines = problems(write(tmp_path, f"{text}{' ' * len(sections)}{last}: {value}\n"))
        assert any(key in line for line in lines), (key, value[:80], lines)


def test_a_description_loads_again_and_leaves_out_what_is_not_in_use(tmp_path):
    cfg = load(None, ["DISTILLER.TYPE", "KD", "TEMPERATURE.ERRATUM.MARGIN", "0.1"])
    text = describe(cfg)
    assert "ERRATUM" in text and "DTKD" not in text and "DKD:" not in text
    assert "ERRATUM" not in describe(load())
    assert load(write(tmp_path, text)) == cfg
    cfg = load(None, ["DISTILLER.TYPE", "CTKD", "KD.TEMPERATURE", "3"])
    assert load(write(tmp_path, describe(cfg))) == cfg, "CTKD reads KD's temperature"
    assert "\nKD:" not in describe(load(None, ["DISTILLER.TYPE", "CTKD", "KD.LOSS.KD_WEIGHT", "3"]))


def test_a_name_is_registered_once():
    registry = Registry("thing")
    registry["alpha"] = registry["alpha"] = 1
    with pytest.raises(ValueError, match="registered already"):
        registry["alpha"] = 2
    with pytest.raises(KeyError, match="unknown thing 'alhpa'; did you mean alpha"):
        registry["alhpa"]


CONFIGS = [path for path in sorted((ROOT / "configs").rglob("[!_]*.yaml")) if path.parent.name != "plans"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_begins_with_its_command(path):
    relative = path.relative_to(ROOT)
    cfg = load(path)
    lines = path.read_text().splitlines()
    assert lines[0] == f"# python3 tools/train_ours.py --cfg {relative}"
    special = "lskd" if cfg.EXPERIMENT.LOGIT_STAND else "dot" if cfg.SOLVER.TRAINER == "dot" else ""
    method = special or cfg.DISTILLER.TYPE.lower()
    assert method == relative.parts[2]
    assert cfg.DATASET.TYPE == {"pictures": "imagefolder", "text": "python"}.get(relative.parts[1], relative.parts[1])
    if relative.parts[1] in ("imagenet", "tiny_imagenet"):
        assert lines[1].startswith("# Published top-1: ")
        with torch.device("meta"):
            names = {cfg.DISTILLER.STUDENT} | ({cfg.DISTILLER.TEACHER} if method != "none" else set())
            assert all(build_model(name, 10, cfg.DATASET.TYPE) for name in names)
    if relative.parts[1] == "imagenet":
        rates = {512: 0.2, 256: 0.1, 128: 0.05}
        assert cfg.SOLVER.LR == rates[cfg.SOLVER.BATCH_SIZE]
        assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.LR_DECAY_STAGES) == (100, [30, 60, 90])
        assert cfg.SOLVER.WEIGHT_DECAY == 0.0001
    if relative.parts[1] == "cifar100":
        assert lines[1].startswith("# Published top-1: ")
        if method == "mlkd":
            return  # published with a schedule of its own, which its header names
        small = cfg.DISTILLER.STUDENT in ("MobileNetV2", "ShuffleV1", "ShuffleV2")
        assert cfg.SOLVER.LR == (0.01 if small else 0.05)
        assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.LR_DECAY_STAGES) == (240, [150, 180, 210])
        assert cfg.SOLVER.WEIGHT_DECAY == 0.0005


@pytest.mark.parametrize(
    ("default", "says"),
    [
        (
            "Key(-1.0, 'Mine.', positive)",
            "ValueError: BAD_DEFAULT.T: its default must be greater than 0; got -1.0; mend",
        ),
        ("Key('fixd', 'Mine.', one_of(rules))", "BAD_DEFAULT.T: unknown temperature rule 'fixd'; did you mean fixed? "),
        ("Key('x', 'Mine.', Check(lambda v: v > 0, 'must be more'))", "bad.py:4: TypeError: '>' not sup"),
    ],
)
def test_a_default_that_fails_its_check_is_the_plugins(tmp_path, default, says):
    text = "from mdistiller.config import *\nfrom mdistiller.distillers import *\n"
    text += "from mdistiller.registry import temperature_rules as rules\n"
    text += f"@register_method('BAD_DEFAULT', defaults={{'T': {default}}})\nclass Bad(LogitDistiller): pass\n"
    path = write(tmp_path, text, "bad.py")
    try:
        (line,) = problems(opts=["EXPERIMENT.PLUGINS", str(path), "DISTILLER.TYPE", "BAD_DEFAULT"])
    finally:
        CFG.pop("BAD_DEFAULT", None), KEYS.pop("BAD_DEFAULT.T", None)
    assert says in line
    if "did you mean" in says:
        assert line.endswith("(the default; set BAD_DEFAULT.T) [Mine]")


def test_a_refused_value_says_where_it_is_from_and_what_the_key_means(tmp_path):
    path = write(tmp_path, "KD: {TEMPERATURE: -1}\nSOLVER: {EPOCHS: many, LR: 0.1}")
    assert problems(path, ["SOLVER.LR", "0"]) == [
        f"SOLVER.EPOCHS: must be a whole number, such as 240; got 'many' ({path}) [Training epochs]",
        "SOLVER.LR: must be greater than 0; got 0.0 (command line) [Learning rate of the first epoch]",
        f"KD.TEMPERATURE: must be greater than 0; got -1.0 ({path}) [Temperature tau of both softmax outputs]",
    ]
