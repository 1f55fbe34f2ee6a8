"""Tables as people and programs read them, and what stands beside published figures."""

import json
import os

import numpy as np
import pytest
from studies import write_run

from mdistiller.errors import UserError
from mdistiller.study import tables
from mdistiller.study.groups import group_runs
from mdistiller.study.published import read_published, verdict
from mdistiller.study.results import BESIDE_CAPTION
from mdistiller.study.runs import read_run
from mdistiller.study.statistics import mean_and_std
from mdistiller.terminal import counted

PAIR = {"DISTILLER__TEACHER": "resnet20", "DATASET__TYPE": "cifar100"}
PUBLISHED = {"KD": {"resnet20/resnet8": 60.5, "resnet56/resnet20": None}, "note": "text", "protocol": {"epochs": 2}}


def test_published_figures_stand_beside_runs_of_their_length_only(tmp_path):
    keys = PAIR | {"DISTILLER__TYPE": "KD"}
    runs = [write_run(tmp_path, "short", [50.0], **keys), write_run(tmp_path, "full", [61.0, 60.0], **keys)]
    runs += [write_run(tmp_path, "ruled", [61.0, 60.0], TEMPERATURE__RULE="erratum", **keys)]
    runs += [write_run(tmp_path, "digits", [61.0, 60.0], **keys | {"DATASET__TYPE": "digits"})]
    groups, _ = group_runs([read_run(folder) for folder in runs])
    table = tables.results_table(groups, PUBLISHED)
    short, full, ruled, digits = (dict(zip(table.head, row, strict=True)) for row in table.rows)
    assert (short["schedule"], short["published (%)"]) == ("1 epoch", "60.50 at 2 epochs")
    assert (short["last − published"], short["best − published"]) == (None, None)
    assert (full["published (%)"], full["last − published"], full["best − published"]) == (60.5, -0.5, 0.5)
    assert ruled["published (%)"] is None, "not published with this rule"
    assert digits["published (%)"] is None, "published for other data"
    assert "published (%)" not in tables.results_table(groups, {}).head


def test_a_table_is_markdown_latex_text_and_csv(tmp_path):
    runs = [write_run(tmp_path, f"s{seed}", [50.0 + seed, 60 + seed], seed, **PAIR) for seed in (0, 1)]
    groups, _ = group_runs([read_run(folder) for folder in runs])
    groups[0].extra = "a_b & 50% | {x}\n<b> ~^\\"
    table = tables.results_table(groups, {"NONE": {"resnet8": 60.5}, "protocol": {"epochs": 2}})
    tex, md, text = tables.latex(table), tables.markdown(table), tables.text_table(table)
    assert r"a\_b \& 50\% | \{x\} <b> \textasciitilde \textasciicircum \textbackslash" in tex
    assert r"60.50 $\pm$ 0.71 & 60.50 $\pm$ 0.71 & 60.50 & 0.00 & 0.00 \\" in tex.replace("+", "")
    assert tex.startswith("% \\usepackage{booktabs}\n\\begin{table}\n\\centering\n\\caption{Top-1")
    assert r"n $-$ 1" in tex
    head, rule, row, _, caption = md.splitlines()
    assert len(head) == len(rule) == len(row), "columns are aligned"
    assert r"NONE, a_b & 50% \| {x} &lt;b> ~^\\ |" in row
    assert caption == tables.CAPTION
    assert len(text.splitlines()) == 3
    frame = tables.numbers(table)
    assert [*frame][6:10] == ["last (%)", "last (%) sd", "best (%)", "best (%) sd"]
    assert frame.iloc[0, 6:8].tolist() == [60.5, pytest.approx(0.5**0.5)]


def test_text_of_cells():
    assert [tables.text(cell) for cell in (None, -0.001, 2, "a\nb")] == ["–", "0.00", "2", "a b"]
    assert [tables.text(cell, signed=True) for cell in (-0.5, 0.5)] == ["−0.50", "+0.50"]
    assert [tables.number(cell) for cell in (None, "x", 2, mean_and_std([1.0, 2.0]))] == [None, None, 2, 1.5]


def test_runs_side_by_side(tmp_path):
    folders = [write_run(tmp_path, "a", [50.0, 40.0]), write_run(tmp_path, "long-name", [61.0], seed=12, **PAIR)]
    lines = tables.text_table(tables.compared([read_run(folder) for folder in folders])).splitlines()
    assert [line.split() for line in (lines[0], *lines[2:])] == [
        ["run", "method", "teacher", "student", "data", "seed", "epochs", "last", "best", "at", "epoch"],
        ["a", "NONE", "-", "resnet8", "digits", "0", "2/2", "40.00", "50.00", "1"],
        ["long-name", "NONE", "-", "resnet8", "cifar100", "12", "1/1", "61.00", "61.00", "1"],
    ]


def test_runs_side_by_side_name_what_they_were_computed_from_where_it_differs(tmp_path):
    taught = {"DISTILLER__TYPE": "KD", "DATASET__TYPE": "npz", "DISTILLER__TEACHER": "resnet20"}
    runs = []
    for name, data, teacher in (("r", "x", "t"), ("s", "x", "u"), ("t", "y", "u")):
        keys = {"DATASET__ROOT": f"{data}.npz", "DISTILLER__TEACHER_CKPT": f"{teacher}.pth"}
        folder = write_run(tmp_path, name, [50.0], **taught | keys)
        digests = {"sha256": {"data": data, "teacher": teacher}}
        (folder / "environment.json").write_text(json.dumps(digests))
        runs.append(read_run(folder))
    rows = tables.compared(runs).rows
    assert [(row[2], row[4]) for row in rows] == [
        ("resnet20 t.pth", "npz x.npz"), ("resnet20 u.pth", "npz x.npz"), ("resnet20 u.pth", "npz y.npz"),
    ]  # fmt: skip
    assert tables.compared(runs[1:2]).rows[0][2] == "resnet20"


def test_what_runs_share_stands_above_and_a_terminal_s_width_is_kept(tmp_path):
    names = ["a" * 50, "dtkd,res20,res8+SOLVER.LR:0.1,SOLVER.EPOCHS:1"]
    runs = [read_run(write_run(tmp_path, name, [61.0])) for name in names]
    table = tables.compared(runs)
    assert table.caption == "data digits, seed 0, epochs 1/1"
    wide, narrow = tables.text_table(table).splitlines(), tables.text_table(table, 60).splitlines()
    assert wide == [
        "run" + " " * 49 + "method  teacher  student   last   best  at epoch",
        "-" * 50 + "  ------  -------  -------  -----  -----  --------",
        "a" * 50 + "  NONE    -        resnet8  61.00  61.00         1",
        names[1].ljust(50) + "  NONE    -        resnet8  61.00  61.00         1",
    ]
    assert max(map(len, narrow)) <= 60
    width = next(line for line in narrow if line.startswith("--")).index(" ")
    assert all(text in "".join(line[:width].strip() for line in narrow) for text in names), "nothing is cut"


def test_heads_of_figures_are_broken_before_names_are():
    head = ["run", "method", "last", "at epoch", "last bits/byte", "best bits/byte"]
    row = ["kd,gpt4x128,gpt2x64", "KD", 65.93, 2, "1.3644", "1.3644"]
    lines = tables.text_table(tables.Table("", "", "", head, [row]), 62).splitlines()
    assert max(map(len, lines)) <= 62
    assert lines[-1].split() == ["kd,gpt4x128,gpt2x64", "KD", "65.93", "2", "1.3644", "1.3644"]
    assert [line.split() for line in lines[:3]] == [
        ["run", "method", "last", "at", "last", "best"], ["epoch", "bits/", "bits/"], ["byte", "byte"],
    ]  # fmt: skip


def test_counts_are_said_in_words():
    assert [counted(*pair) for pair in ((1, "epoch"), (2000, "epoch"), (2, "class"))] == [
        "1 epoch", "2,000 epochs", "2 classes",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON"), ("[]", "expected"), ('{"KD": 3}', "expected"), (None, "is a pipe .* --published")],
)
def test_a_file_of_published_figures_that_is_none_is_refused(tmp_path, text, message):
    file = tmp_path / "published.json"
    os.mkfifo(file) if text is None else file.write_text(text)
    with pytest.raises(UserError, match=f"published.json: {message}"):
        read_published(file)
    assert read_published(None) == {}


def test_the_verdict_says_where_the_published_figure_lies():
    ours = mean_and_std([70.0, 71.0, 72.0])  # 71 +- 1
    assert [verdict(ours, figure) for figure in (69.9, 70.0, 71.0, 72.0, 72.1)] == [
        "below", "inside", "inside", "inside", "above",
    ]  # fmt: skip
    assert verdict(ours, 72.1, off=0.15) == "inside"
    assert verdict(mean_and_std([70.0]), 80.0) == "one seed"


def test_the_caption_says_how_often_an_equally_good_run_lies_outside():
    draws = np.random.default_rng(0).normal(size=(200_000, 4))
    for n, percent in ((2, 56), (3, 48)):
        ours, other = draws[:, :n], draws[:, -1]
        outside = np.abs(other - ours.mean(1)) > ours.std(1, ddof=1)
        assert round(100 * outside.mean()) == percent
        assert f"n = {n}: {percent} %" in BESIDE_CAPTION
