"""Studies' results: every seed on record, never two protocols, charts beside them."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from studies import PLANS, PUBLISHED, change, record, write_records

from mdistiller.config import load
from mdistiller.distillers import distiller_dict
from mdistiller.errors import UserError
from mdistiller.study import plan, results
from mdistiller.study.bars import shade
from mdistiller.study.records import read_records, run_of

FIGURES = ROOT / "results/published.json"


def of(tmp_path, *records, published=PUBLISHED, only=()):
    """The results of a runs.jsonl with these lines."""
    file = write_records(tmp_path / "some" / "runs.jsonl", *records)
    return results.results_of(read_records(file).values(), published, PLANS, only=only)


def records_of(study, seeds=None):
    """A line for each run of the study, in so many seeds."""
    base, lines = record() | {"plan": study.name}, []
    for group in study.groups:
        source = group.teacher
        teacher = {"run": "t", "sha256": "t", "config": source.settings} if source else None
        curve = [60.0] * group.cfg.SOLVER.EPOCHS
        own = {"cell": group.name, "teacher": teacher, "epochs": len(curve), "curve": curve}
        lines += [base | own | {"seed": run.seed, "config": run.settings} for run in group.runs[:seeds]]
    return lines


def test_a_table_is_what_a_hand_computes(tmp_path):
    """59, 60 and 62: mean 60.33, deviation sqrt((1.78 + 0.11 + 2.78) / 2) = 1.53."""
    runs = [record(seed=s, last=v - 1, best=v) for s, v in enumerate((59.0, 60.0, 62.0))]
    runs += [record("NONE", seed=0, last=58.0, best=58.5), record("DTKD", seed=5, last=60.0, best=60.5)]
    found = of(tmp_path, *runs)
    rows = [[str(cell) for cell in row] for row in found.table.rows]
    # pair, method, n, seeds, last, best, published, best - published, lies
    assert rows[0][:7] == ["resnet20 → resnet8", "KD", "3", "0, 1, 2", "59.33 ± 1.53", "60.33 ± 1.53", "~59.3"]
    assert float(rows[0][7]) == pytest.approx(60.3333 - 59.3, abs=1e-3)
    assert rows[0][8] == "inside"
    assert rows[1][:7] == ["resnet8", "NONE", "1", "0", "58.00", "58.50", "59.90"]
    assert rows[1][8] == "one seed"
    assert rows[2][6] == "~61.9"
    assert "+1.03" in found.markdown
    assert "240 epochs, batches of 64, learning rate 0.05" in found.markdown
    assert max(map(len, found.text.splitlines())) <= 80
    assert "+1.03" not in found.text
    assert "**" not in found.text


def test_another_protocol_is_labelled_and_not_compared(tmp_path):
    keys = {"SOLVER__EPOCHS": 8, "SOLVER__LR_DECAY_STAGES": "[5,7]", "SOLVER__AMP": "bf16"}
    found = of(tmp_path, *(record(method, **keys) for method in ("NONE", "KD")))
    assert "published (%)" not in found.table.head
    assert "**Not the published protocol**: SOLVER.EPOCHS 8 (published: 240)" in found.markdown
    assert found.charts[0].title == "Results (not the published protocol): resnet8"
    assert "bf16 autocast" in found.markdown


def test_other_hyperparameters_are_named_and_not_compared(tmp_path):
    found = of(tmp_path, record("KD", KD__TEMPERATURE=20.0), record("DTKD"))
    kd, dtkd = (dict(zip(found.table.head, row, strict=True))["published (%)"] for row in found.table.rows)
    assert (kd, dtkd) == (None, "~61.9")
    assert "**Not the published hyperparameters**: KD.TEMPERATURE 20" in " ".join(found.notes)
    assert found.charts[0].title == "Results (not the published hyperparameters): resnet8"


def test_runs_of_different_protocols_do_not_mix(tmp_path):
    short = record("DTKD", SOLVER__EPOCHS=12)
    other = record("DKD") | {"sha256": {"data": "another", "student": "s"}}
    found = of(tmp_path, record("KD"), record("KD", seed=1), short, other)
    assert [row[1] for row in found.table.rows] == ["KD"]
    assert re.search(
        r"Left out: DTKD,resnet20,resnet8, of another protocol .*SOLVER.EPOCHS \(240 / 12\)", found.markdown
    )
    assert re.search(r"Left out: DKD,resnet20,resnet8, of another protocol .*sha256 of the data", found.markdown)
    found = of(tmp_path, record(seed=0), record(seed=1), record(seed=2, SOLVER__LR=0.1))
    assert [row[1:4] for row in found.table.rows] == [
        ["KD, SOLVER.LR 0.05", 2, "0, 1"], ["KD, SOLVER.LR 0.1", 1, "2"],
    ], "never averaged"  # fmt: skip


def test_a_record_of_no_plan_is_shown(tmp_path):
    mine = write_records(tmp_path / "mine/runs.jsonl", record(seed=0), record(seed=1))
    show = lambda file, only=(): results.show(str(file), PLANS, None, None, FIGURES, only)  # noqa: E731
    assert re.search(r"\| resnet20 → resnet8 \| KD +\| 2 +\| 0, 1 +\|", show(mine))
    assert (tmp_path / "mine/all/chart-resnet8.png").stat().st_size > 10_000
    for file, only, message in (
        (tmp_path / "x.jsonl", [], "is no file"),
        (mine, ["DKD"], "matches --only DKD"),
        (write_records(tmp_path / "none/runs.jsonl"), [], "holds no run"),
    ):
        with pytest.raises(UserError, match=message):
            show(file, only)


def test_a_plans_table_has_every_seed_and_says_which_are_missing(small_plan):
    study = plan.load(small_plan)
    runs = [run_of(line) for line in records_of(study)]
    shown = lambda study, runs: results.results_of(runs, {}, PLANS, study)  # noqa: E731
    more = shown(plan.load(small_plan, seeds=[0, 1, 2]), runs)
    assert [row[2:4] for row in more.table.rows] == [[2, "0, 1"], [1, "0"], [2, "0, 1"], [2, "0, 1"]]
    assert "Not run yet: NONE,resnet8 (seed 2); KD" in more.markdown
    less = shown(plan.load(small_plan, seeds=[1]), runs)
    assert [row[2] for row in less.table.rows] == [2, 1, 2, 2], "seeds are never picked"
    assert "Not run yet" not in less.markdown
    other = shown(plan.load(change(small_plan, overrides={"SOLVER": {"LR": 0.01}})), runs)
    assert other.markdown.startswith("Nothing of it is on record yet.\n")
    assert "Left out: NONE,resnet8 (seeds 0, 1), run by another protocol: SOLVER.LR (0.05 / 0.01)." in other.notes
    assert len(other.notes) == 4


def test_a_plans_table_leaves_out_what_does_not_fit_the_rest(small_plan):
    study = plan.load(small_plan)
    lines = records_of(study)
    for line in lines:
        line["sha256"] = {"data": "another" if line["cell"].startswith("KD") else "d", "student": "s"}
    found = results.results_of(map(run_of, lines), {}, PLANS, study)
    assert [row[1] for row in found.table.rows] == ["NONE", "NONE", "DTKD"]
    assert "Left out: KD,resnet14,resnet8, of another protocol than the other rows: sha256 of" in found.markdown


def test_every_plan_can_be_shown_and_has_runs_of_folders_and_hashes_of_their_own():
    for file in sorted(PLANS.glob("*.yaml")):
        study = plan.load(file)
        assert study.title and f"python3 tools/reproduce.py {file.stem}\n" in file.read_text()
        runs = [run for group in study.groups for run in group.runs]
        for what in ("label", "folder", "hash"):
            assert len({getattr(run, what) for run in runs}) == len(runs)
        labels = [run.label for run in runs]
        for group in study.groups:
            if group.teacher:
                assert labels.index(group.teacher.label) < labels.index(group.first.label), "teachers come first"
                assert group.cfg.DISTILLER.TEACHER_CKPT == str(group.teacher.student_file)
                assert group.teacher.cfg.SOLVER.EPOCHS == group.cfg.SOLVER.EPOCHS
        found = results.results_of(map(run_of, records_of(study, 1)), PUBLISHED, PLANS, study)
        assert len(found.table.rows) == len(study.groups)
        assert found.charts
        if study.name == "rules":
            assert [chart.name for chart in found.charts] == ["chart-resnet56-resnet20", "chart-resnet32x4-resnet8x4"]
            assert all(len(panel.series) == 4 for panel in found.charts[0].panels), "KD, DKD, DTKD, the student alone"
        if study.name in ("dtkd_charts", "dtkd_pairs", "rules", "resnet8"):
            assert not any(line.startswith("**") for line in found.notes), found.notes
            assert "published (%)" in found.table.head


def test_charts_have_a_bar_for_each_method_and_a_level_for_the_student(tmp_path):
    runs = [record("NONE", seed=s, best=59.0 + s) for s in (0, 1)]
    for teacher in ("resnet110", "resnet20"):
        runs += [record(m, teacher, seed=s, best=60.0 + s) for m in ("KD", "DTKD") for s in (0, 1)]
    found = of(tmp_path, *runs[:-1])  # one seed of DTKD with resnet20 alone
    found.title, found.notes = "T & T", ["a note\nof two lines"]
    (chart,) = found.charts
    best, last = chart.panels
    assert [(s.name, s.kind, list(s.x)) for s in best.series] == [
        ("KD", "bars", ["resnet20", "resnet110"]), ("DTKD", "bars", ["resnet20", "resnet110"]),
        ("resnet8 alone", "level", ["teacher"]),
    ]  # fmt: skip
    (ends,) = best.series[0].bands.values()
    np.testing.assert_allclose(np.subtract(*ends[::-1]), 2 * 0.5**0.5)  # 60 and 61: 60.5 +- 0.707
    np.testing.assert_allclose(best.series[1].bands["minus_sd", "plus_sd"][0][0], 60.0)
    found.write(tmp_path)
    folder = tmp_path / "all"
    names = {"table.md", "table.tex", "table.csv", "chart-resnet8.png", "chart-resnet8.svg"}
    assert {path.name for path in folder.iterdir()} == names
    same = names - {"chart-resnet8.svg"}  # whose clip paths are numbered through
    before = {name: (folder / name).read_bytes() for name in same}
    found.write(tmp_path)
    assert before == {name: (folder / name).read_bytes() for name in same}, "the same figures give the same files"
    assert b"\\caption{T \\& T. Top-1" in before["table.tex"]
    assert b"% a note\n% of two lines\n" in before["table.tex"]
    assert before["table.csv"].decode().splitlines()[0].startswith("pair,method,n,seeds,last (%),last (%) sd,")


def test_a_methods_colour_does_not_depend_on_what_else_is_shown(tmp_path):
    every = [name for name in distiller_dict if name != "NONE"]
    assert len({shade(name) for name in every}) == len(every)
    (chart,) = of(tmp_path, record("DTKD"), record("SP")).charts
    assert [s.colour for s in chart.panels[0].series] == [shade("DTKD"), shade("SP")]


def test_a_method_without_a_teacher_is_not_the_student_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(distiller_dict["AT"], "needs_teacher", False)
    runs = [record("NONE", best=59.0), record("KD", best=61.0), record("AT", best=60.0) | {"teacher": None}]
    (chart,) = of(tmp_path, *runs).charts
    assert [(s.name, list(s.x), s.text[-1]) for s in chart.panels[0].series] == [
        ("AT", ["none", "resnet20"], "nan"), ("KD", ["none", "resnet20"], "61.0"),
        ("resnet8 alone", ["teacher"], "59.0"),
    ]  # fmt: skip


def test_pairs_of_different_students_share_one_chart(tmp_path):
    runs = [record("NONE", student=s) for s in ("resnet8", "resnet20")]
    runs += [record("KD", "resnet56", s) for s in ("resnet8", "resnet20")]
    (chart,) = of(tmp_path, *runs).charts
    assert [(s.name, list(s.x)) for s in chart.panels[0].series] == [
        (name, ["resnet56 → resnet8", "resnet56 → resnet20"]) for name in ("alone", "KD")
    ]


def test_the_page_shows_what_the_results_give():
    page = ROOT / "docs" / "reproduction.md"
    text = results.fill(page, PLANS, FIGURES, ROOT / "results", write=False)
    assert text == page.read_text(), "run: make results"
    assert len(results.MARKERS.findall(text)) >= 3
    for file in (ROOT / "results").glob("*/table.md"):
        assert file.read_text().partition("\n\n")[2] in text


def test_a_page_links_the_charts_where_they_are(tmp_path):
    write_records(tmp_path / "mine/runs.jsonl", *records_of(plan.load(PLANS / "cpu_charts.yaml")))
    page = tmp_path / "pages/page.md"
    page.parent.mkdir()
    page.write_text("<!-- results of cpu_charts -->\n<!-- end of results -->\n")
    text = results.fill(page, PLANS, None, tmp_path / "mine")
    (link,) = re.findall(r"\]\((.*?)\)", text)
    assert (page.parent / link).is_file()
    page.write_text("nothing")
    for file in (page, Path("gone.md")):
        with pytest.raises(UserError, match="--page"):
            results.fill(file, PLANS, None, tmp_path / "mine")
    assert len(read_records(tmp_path / "mine/runs.jsonl")) == 12


def test_the_protocol_says_how_the_rate_goes_on():
    def course(**keys):
        return results._course(load(None, [word for key, v in keys.items() for word in (f"SOLVER.{key}", v)]).SOLVER)

    assert course() == "times 0.1 after epochs 150, 180, 210"
    assert course(EPOCHS=160) == "times 0.1 after epochs 150"
    assert course(EPOCHS=2) == "constant"
    assert course(SCHEDULE="cosine", WARMUP=5) == "along a cosine to 0, warm-up 5"
