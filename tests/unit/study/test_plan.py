"""Plans: what they stand for, and what is said of one that cannot work."""

import json
from pathlib import Path

import pytest
from helpers import ROOT
from studies import PLANS, PUBLISHED, change, write

from mdistiller.config.seeds import parse_seeds
from mdistiller.errors import ConfigError, UserError
from mdistiller.study import plan
from mdistiller.study.published import departures
from mdistiller.study.records import read_records
from mdistiller.study.reproduce import parse_parameters, parse_time


def runs_of(study):
    return [run for group in study.groups for run in group.runs]


def test_what_is_on_record_is_found_again():
    """Whatever has been added to the configuration and the hash since it was run."""
    records = read_records(ROOT / "results" / "runs.jsonl")
    lines = [json.loads(line) for line in (ROOT / "results" / "runs.jsonl").read_text().splitlines()]
    assert len(records) == len(lines) > 12
    names = "cpu_charts", "resnet8", "scenes"
    planned = {name: {run.hash for run in runs_of(plan.load(PLANS / f"{name}.yaml"))} for name in names}
    assert planned["cpu_charts"] < set(records) <= set.union(*planned.values())
    assert [run.label for run in records.values()] == [f"{line['cell']},seed{line['seed']}" for line in lines]


def test_the_published_plans_are_what_was_published():
    charts, pairs = plan.load(PLANS / "dtkd_charts.yaml"), plan.load(PLANS / "dtkd_pairs.yaml")
    assert {g.name.partition(",")[2] for g in charts.groups if g.teacher} == {
        f"{teacher},{student}"
        for student in ("resnet8", "MobileNetV2")
        for teacher in PUBLISHED[f"dtkd_chart_{student}"]["teacher"]
    }
    assert {g.name for g in pairs.groups if g.name.startswith("DKD")} == {
        "DKD," + pair.replace("/", ",") for pair in PUBLISHED["pairs_in_the_seed_configs"]
    }
    for group in (*charts.groups, *pairs.groups):
        assert departures(group, PUBLISHED) == [], group.name
        names = group.cfg.DISTILLER
        if names.TYPE in ("DKD", "DTKD"):
            wanted = PUBLISHED[f"{names.TYPE.lower()}_hyperparameters"]
            for key, value in (wanted["default"] | wanted.get(f"{names.TEACHER}/{names.STUDENT}", {})).items():
                assert group.cfg[names.TYPE][key] == value, (group.name, key)


def test_published_figures_are_those_of_the_reference():
    reference = ROOT.parent / "shared" / "reference" / "published.json"
    if not reference.exists():
        pytest.skip("../shared/reference is not here")
    assert json.loads(reference.read_text()) == PUBLISHED


def test_a_plan_reports_all_its_mistakes_at_once(small_plan):
    change(
        small_plan, metods=["KD"], methods=["KD", "DTKDD", "FITNET"], rules=["std", "hot"], seeds=[0, "one", -1],
        pairs=["resnet14/resnet8", "resnet14", "resnet21/resnet8"], note=3, students=["resnet8"],
        overrides={"SOLVER": {"EPOCS": 3, "LR": "much"}, "SEED": 4, "DISTILLER": {"TYPE": "KD"}},
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        plan.load(small_plan)
    text = str(caught.value)
    for line in (
        "unknown key 'metods'; did you mean methods?", "unknown method 'DTKDD'; did you mean DTKD?",
        "seeds: takes whole numbers; got 'one'", "SEED: must be in [0, 2**32); got -1",
        "must be teacher/student, such as resnet56/resnet20; got resnet14",
        "unknown model 'resnet21'; did you mean resnet32?", "note: must be text", "SEED is the plan's own business",
        "DISTILLER.TYPE is the plan's own business", "SOLVER.EPOCS: unknown key; did you mean SOLVER.EPOCHS?",
        "SOLVER.LR: must be a number",
    ):  # fmt: skip
        assert line in text, f"{line}\n{text}"
    assert all(line.startswith(f"{small_plan}: ") for line in text.splitlines())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pairs": []}, "give either pairs: [teacher/student, ...], or teachers: and students:"),
        ({"methods": []}, "methods: is missing"),
        ({"rules": ["hot"]}, "TEMPERATURE.RULE: unknown temperature rule 'hot'"),
        ({"rules": ["std"], "methods": ["FITNET"]}, "TEMPERATURE.RULE: FITNET takes no temperature rule"),
        ({"configs": "nowhere"}, "configs: there is no folder"),
        ({"pairs": ["resnet14/resnet20"]}, "none has no YAML for resnet20; add one"),
        ({"teacher_seed": True}, "teacher_seed: must be a whole number"),
        ({"overrides": {"EXPERIMENT": {"PLUGINS": ["gone.py"]}}}, "'gone.py' is neither an existing"),
    ],
)
def test_a_plan_says_what_it_lacks(small_plan, keys, message):
    with pytest.raises(ConfigError) as caught:
        plan.load(change(small_plan, **keys))
    assert message in str(caught.value)


def test_a_student_alone_needs_no_method_in_its_file(small_plan):
    file = small_plan.parent / "configs" / "none" / "resnet8.yaml"
    change(file, DISTILLER={"STUDENT": "resnet8"})
    assert "resnet8" in {group.cfg.DISTILLER.STUDENT for group in plan.load(small_plan).groups}


def test_a_plan_may_take_teachers_that_are_trained_already():
    study = plan.load(PLANS / "imagenet_pairs.yaml")
    assert {group.cfg.DISTILLER.TEACHER_CKPT for group in study.groups if group.method != "NONE"} == {"pretrained"}
    assert all(group.teacher is None for group in study.groups)
    assert {group.cfg.DISTILLER.STUDENT for group in study.groups} == {"ResNet18", "MobileNetV1"}


def test_a_teacher_is_the_same_under_every_trainer_of_its_students():
    first, second = (plan.load(PLANS / f"{name}.yaml").groups for name in ("tiny_imagenet", "tiny_imagenet_dot"))
    (teacher,) = {group.teacher.hash for group in first if group.teacher}
    assert {group.teacher.hash for group in second if group.teacher} == {teacher}
    assert {group.cfg.SOLVER.TRAINER for group in second if group.teacher} == {"dot"}


def test_a_plan_inherits(small_plan):
    child = write(Path("child.yaml"), _BASE_="small.yaml", seeds=[7], overrides={"SOLVER": {"LR": 0.1}})
    study = plan.load(child)
    assert [run.seed for run in runs_of(study)] == [7, 0, 7, 7], "the teacher keeps its seed"
    assert {group.cfg.SOLVER.LR for group in study.groups} == {0.1}
    assert study.groups[-1].cfg.DTKD.WARMUP == 1
    assert "DTKD.WARMUP" not in study.groups[0].opts, "sections of other methods stand in no run's name"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("KD", ["NONE,resnet14", "KD,resnet14,resnet8"]),
        ("none,RESNET8", ["NONE,resnet8"]),
        ("*kd,resnet8", ["NONE,resnet14", "KD,resnet14,resnet8", "DTKD,resnet14,resnet8"]),
    ],
)
def test_only_takes_along_the_teachers(small_plan, pattern, names):
    study = plan.load(small_plan)
    chosen = study.select([pattern])
    assert [group.name for group in chosen] == names
    assert all([r.seed for r in g.runs] == ([0] if g.name == "NONE,resnet14" else [0, 1]) for g in chosen)
    with pytest.raises(UserError, match=r"--only DKD: names nothing in the plan small, which has NONE,resnet8 "):
        study.select(["DKD"])


def test_a_grid_runs_one_student_after_the_other(small_plan):
    for name in ("resnet20", "resnet32"):
        alone = {"TYPE": "NONE", "STUDENT": name}
        write(Path(f"configs/none/{name}.yaml"), _BASE_="resnet8.yaml", DISTILLER=alone)
    tree = {"configs": "configs", "methods": ["NONE", "KD"], "seeds": [0]}
    grid = plan.load(write(small_plan, **tree, teachers=["resnet20", "resnet32"], students=["resnet8", "resnet14"]))
    assert [group.name for group in grid.groups] == [
        "NONE,resnet8", "NONE,resnet20", "KD,resnet20,resnet8", "NONE,resnet32", "KD,resnet32,resnet8",
        "NONE,resnet14", "KD,resnet20,resnet14", "KD,resnet32,resnet14",
    ]  # fmt: skip
    listed = plan.load(write(small_plan, **tree, pairs=["resnet20/resnet8", "resnet32/resnet8", "resnet20/resnet14"]))
    assert [group.name for group in listed.groups if group.teacher] == [
        "KD,resnet20,resnet8", "KD,resnet20,resnet14", "KD,resnet32,resnet8",
    ]  # fmt: skip


def test_runs_that_would_share_a_folder_are_refused(small_plan):
    pair = {"TYPE": "KD", "TEACHER": "resnet14", "STUDENT": "resnet8"}
    write(Path("configs/kd/pair.yaml"), _BASE_="../none/resnet8.yaml", EXPERIMENT={"NAME": "x"}, DISTILLER=pair)
    write(Path("configs/dtkd/pair.yaml"), _BASE_="../kd/pair.yaml", DISTILLER={"TYPE": "DTKD"})
    with pytest.raises(ConfigError, match=r"DTKD,resnet14,resnet8,seed1: is not alone in the folder output/"):
        plan.load(change(small_plan, overrides={}))


def test_seeds_times_and_parameters():
    assert parse_seeds(["0-2,5", "9"]) == [0, 1, 2, 5, 9]
    assert [parse_time(text) for text in ("2h", "90m", "1h30m", "0.5d", "45s")] == [7200, 5400, 5400, 43200, 45]
    assert parse_parameters(["timeout_min=5", "slurm_partition=gpu"]) == {"timeout_min": 5, "slurm_partition": "gpu"}
    for parse, bad in (
        (lambda text: parse_seeds([text]), ("", "4-2", "a", "-1", "0-99999999", "0-999,1000", "1,1")),
        (parse_time, ("", "2", "h", "2 hours", "-1h")),
        (parse_parameters, (["x"],)),
    ):
        for text in bad:
            with pytest.raises(UserError):
                parse(text)
