"""runs.jsonl: lines become runs again; a line is replaced, never another one; a damaged line is named."""

import json

import pytest
from studies import record, write_records

from mdistiller import config
from mdistiller.config import Key
from mdistiller.errors import UserError
from mdistiller.study.records import export, read_records


def test_a_line_becomes_its_run(tmp_path):
    line = record(last=59.0, best=62.5, seed=3) | {"students": 2.0, "seconds": 480.0}
    (run,) = read_records(write_records(tmp_path / "runs.jsonl", line)).values()
    assert (run.label, run.study, run.epochs) == ("KD,resnet20,resnet8,seed3", "p", 240)
    assert (run.rows[-1]["test_acc"], run.rows[-1]["best_acc"], run.rows[-1]["best_epoch"]) == (59.0, 62.5, 1)
    assert (run.seconds, run.students) == (pytest.approx(480), pytest.approx(2))
    assert run.commits == line["git"]
    assert run.settings == line["config"]
    assert run.teacher == line["teacher"]["config"]


def test_an_export_replaces_the_run_s_own_line_alone(tmp_path):
    file = tmp_path / "new" / "runs.jsonl"
    for seed in range(3):
        export(file, record(seed=seed))
    before = file.read_text().splitlines()
    export(file, record(seed=1, last=50.0))
    after = file.read_text().splitlines()
    assert [after[0], after[2]] == [before[0], before[2]]
    assert json.loads(after[1])["last"] == 50.0
    assert len(read_records(file)) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"versions": None}, {"sha256": None}, {"teacher": {"run": "t", "config": {}}}, {"curve": [1.0]},
        {"config": {"SOLVER.LR": "much"}}, {"config": {"SOLVER": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_line_that_no_table_could_be_made_of_is_named(tmp_path, change):
    file = write_records(tmp_path / "runs.jsonl", record(), record(seed=1) | change)
    for text in (file.read_text(), file.read_text()[:-40]):
        file.write_text(text)
        with pytest.raises(UserError, match="line 2: is no record of a run; mend or remove that line"):
            read_records(file)


def test_a_record_that_cannot_be_read_is_one_line(tmp_path):
    assert read_records(tmp_path / "runs.jsonl") == {}
    (tmp_path / "runs.jsonl").mkdir()
    with pytest.raises(UserError, match=r"runs.jsonl: cannot be read \(Is a directory\)"):
        read_records(tmp_path / "runs.jsonl")


def test_a_key_that_is_added_later_makes_no_run_another_one(tmp_path, monkeypatch):
    file = write_records(tmp_path / "runs.jsonl", record("DTKD"), record("NONE"))
    before = list(read_records(file).values())
    monkeypatch.setitem(config.KEYS, "SOLVER.LOOKAHEAD", Key(0))
    monkeypatch.setitem(config.CFG.SOLVER, "LOOKAHEAD", 0)
    for run, later in zip(before, read_records(file).values(), strict=True):
        assert later.cfg.SOLVER.LOOKAHEAD == 0
        assert later.settings == run.settings | {"SOLVER.LOOKAHEAD": 0}
        if run.teacher:
            assert later.teacher == run.teacher | {"SOLVER.LOOKAHEAD": 0}
