"""tools/analyze.py from run folders to the report: groups, tables, temperatures, charts, failures."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import tool

from mdistiller.analysis import results, temperatures
from mdistiller.analysis.analyse import analyse
from mdistiller.analysis.charts import Chart, Panel, Series, write_numbers
from mdistiller.analysis.drawing import draw
from mdistiller.analysis.networks import Networks
from mdistiller.analysis.page import escape, page
from mdistiller.analysis.runs import group_runs, read_run, rule_of
from mdistiller.engine.cfg import load
from mdistiller.errors import UserError
from mdistiller.runs.temperature import EpochBuffer, RecordFile


def write_run(root, name, accuracies, seed=0, finished=None, **keys):
    """A run's folder with a configuration and these test accuracies."""
    folder = root / name
    folder.mkdir(parents=True)
    opts = {"DATASET.TYPE": "digits", "DISTILLER.STUDENT": "resnet8", "SOLVER.EPOCHS": len(accuracies), "SEED": seed}
    opts |= {key.replace("__", "."): value for key, value in keys.items()}
    cfg = load(None, [word for pair in opts.items() for word in pair])
    (folder / "config.yaml").write_text(cfg.dump())
    rows = [
        {"epoch": n, "test_acc": acc, "best_acc": max(accuracies[:n]), "train_acc": acc, "train_loss": 1 / n}
        for n, acc in enumerate(accuracies[:finished], 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# runs and groups


def test_seeds_are_averaged_and_nothing_else(tmp_path):
    folders = [
        write_run(tmp_path, "a0", [50.0, 60.0], 0),
        write_run(tmp_path, "b0", [10.0, 90.0], 0, SOLVER__LR=0.1),
        write_run(tmp_path, "a1", [70.0, 64.0], 1, DATASET__ROOT="elsewhere", EXPERIMENT__NAME="other"),
        write_run(tmp_path, "a2", [50.0, 68.0], 2, finished=1),
        write_run(tmp_path, "k0", [50.0, 60.0], 0, DISTILLER__TYPE="KD", DISTILLER__TEACHER="resnet20"),
        write_run(
            tmp_path, "k1", [5.0, 6.0], 1, DISTILLER__TYPE="KD", DISTILLER__TEACHER="resnet20",
            EXPERIMENT__LOGIT_STAND=True,
        ),
        write_run(tmp_path, "a0~1", [50.0, 60.0], 0),
    ]  # fmt: skip
    groups, notes = group_runs([read_run(folder) for folder in folders])
    assert [[run.name for run in group.runs] for group in groups] == [["a0", "a1"], ["b0"], ["a2"], ["k0"], ["k1"]]
    assert notes == ["a0~1: left out, it repeats SEED 0 of a0"]
    assert groups[0].last == (62, pytest.approx(8**0.5), 2)
    assert groups[0].best == (65, pytest.approx(50**0.5), 2)
    assert groups[2].schedule == "1 of 2 epochs"
    assert [group.label for group in groups] == [
        "alone, resnet8, 2 epochs, SOLVER.LR 0.05",
        "alone, resnet8, 2 epochs, SOLVER.LR 0.1",
        "alone, resnet8, 1 of 2 epochs",
        "KD, resnet20 → resnet8, 2 epochs",
        "KD+LSKD, resnet20 → resnet8, 2 epochs",
    ]


@pytest.mark.parametrize(
    ("opts", "rule"),
    [
        ({"DISTILLER.TYPE": "NONE"}, "-"),
        ({"DISTILLER.TYPE": "AT"}, "-"),
        ({"DISTILLER.TYPE": "DTKD"}, "max_logit"),
        ({"DISTILLER.TYPE": "KD"}, "fixed"),
        ({"DISTILLER.TYPE": "KD", "TEMPERATURE.RULE": "erratum"}, "erratum"),
        ({"DISTILLER.TYPE": "KD", "EXPERIMENT.LOGIT_STAND": True}, "std"),
    ],
)
def test_rule(opts, rule):
    assert rule_of(load(None, [word for pair in opts.items() for word in pair])) == rule


def test_a_configuration_without_the_section_has_its_method_s_rule(tmp_path):
    folder = write_run(tmp_path, "old", [50.0], DISTILLER__TYPE="DTKD")
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    del tree["TEMPERATURE"], tree["EXPERIMENT"]["LOGIT_STAND"]
    (folder / "config.yaml").write_text(yaml.dump(tree))
    assert rule_of(read_run(folder).cfg) == "max_logit"


# the results table


PAIR = {"DISTILLER__TEACHER": "resnet20", "DATASET__TYPE": "cifar100"}
PUBLISHED = {"KD": {"resnet20/resnet8": 60.5, "resnet56/resnet20": None}, "note": "text", "protocol": {"epochs": 2}}


def cell(table, head, row=0):
    return table.rows[row][table.head.index(head)]


def test_published_figures_stand_beside_runs_of_their_length_only(tmp_path):
    keys = PAIR | {"DISTILLER__TYPE": "KD"}
    runs = [write_run(tmp_path, "short", [50.0], **keys), write_run(tmp_path, "full", [61.0, 60.0], **keys)]
    runs += [write_run(tmp_path, "ruled", [61.0, 60.0], TEMPERATURE__RULE="erratum", **keys)]
    runs += [write_run(tmp_path, "digits", [61.0, 60.0], **keys | {"DATASET__TYPE": "digits"})]
    groups, _ = group_runs([read_run(folder) for folder in runs])
    table = results.results_table(groups, PUBLISHED)
    assert cell(table, "published (%)") == "60.50 at 2 epochs"
    assert cell(table, "last − published") is None
    assert cell(table, "schedule") == "1 epochs"
    assert cell(table, "published (%)", 1) == 60.5
    assert cell(table, "last − published", 1) == pytest.approx(-0.5)
    assert cell(table, "best − published", 1) == pytest.approx(0.5)
    assert cell(table, "published (%)", 2) is None, "not published with this rule"
    assert cell(table, "published (%)", 3) is None, "published for other data"
    assert "published (%)" not in results.results_table(groups, {}).head


def test_latex_and_markdown(tmp_path):
    runs = [
        write_run(tmp_path, f"s{seed}", [50.0 + seed, 60.0 + seed], seed, **PAIR, DISTILLER__TYPE="KD")
        for seed in (0, 1)
    ]
    groups, _ = group_runs([read_run(folder) for folder in runs])
    groups[0].extra = "a_b & 50% | {x}\n<b>"
    table = results.results_table(groups, PUBLISHED)
    tex, md = results.latex(table), results.markdown(table)
    assert r"a\_b \& 50\% | \{x\} <b>" in tex
    assert r"60.50 $\pm$ 0.71 & 60.50 $\pm$ 0.71 & 60.50 & +0.00" in tex
    assert r"resnet20 $\to$ resnet8" in tex
    row = md.splitlines()[2]
    assert r"a_b & 50% \| {x} &lt;b>" in row
    assert "60.50 ± 0.71" in row


def test_text_of_cells():
    assert results.text(None) == "–"
    assert results.text(-0.001) == "0.00"
    assert results.text(-0.5, signed=True) == "−0.50"
    assert results.text(0.5, signed=True) == "+0.50"


# temperatures


def record_epochs(folder, temperatures_of, n=40):
    """A record whose student temperatures are temperatures_of(epoch), the teacher's 8 minus them."""
    file = RecordFile(folder / "temperatures.bin", n)
    for epoch in range(4):
        buffer = EpochBuffer(n, torch.device("cpu"))
        values = torch.as_tensor(temperatures_of(epoch), dtype=torch.float32)
        buffer.values[:2] = torch.stack([values, 8 - values])
        buffer.values[2:] = 1
        file.append(buffer)


def test_a_record_alone_gives_bands_and_hot_samples(tmp_path):
    keys = {
        "DISTILLER__TEACHER": "resnet8",
        "DISTILLER__TYPE": "DTKD",
        "DATASET__TYPE": "npz",
        "DATASET__ROOT": "gone.npz",
    }
    folder = write_run(tmp_path, "run", [1.0, 2, 3, 4], **keys)
    record_epochs(folder, lambda epoch: np.arange(40) / 10 + epoch)
    run = read_run(folder)
    over = temperatures.over_epochs(run)
    assert over.epochs == [1, 2, 3, 4]
    np.testing.assert_allclose(over.figures["t_student q50"], 1.95 + np.arange(4), atol=5e-3)
    np.testing.assert_allclose(over.figures["t_teacher q25"], 8 - 2.925 - np.arange(4), atol=5e-3)
    samples, notes = temperatures.samples_of(run, Networks())
    assert np.flatnonzero(samples.hot_student).tolist() == [36, 37, 38, 39]
    assert samples.hot_student.max() == 1
    np.testing.assert_allclose(samples.student, np.arange(40) / 10 + 3, atol=5e-3)
    assert samples.stability.tolist() == pytest.approx([1, 1, 1, 1])
    (note,) = notes
    assert "DATASET.ROOT" in note
    head, rows = temperatures.sample_rows(samples, None)
    assert rows[0][head.index("index")] == 39


def test_hot_samples_are_ranked_against_difficulty():
    n, hard = 100, np.arange(100.0)
    samples = temperatures.Samples(None, None, 4 + hard / 100, 4 - hard / 100, np.zeros(n), np.zeros(n), np.ones(4), 4)
    samples.loss, samples.margin = hard, -hard

    class Named:
        label, rule = "group", "max_logit"

    over = temperatures.OverEpochs([1], {f"{side} q50": np.array([4.0]) for side in temperatures.SIDES})
    row = dict(zip(temperatures.FINDINGS, temperatures.findings_row(Named, over, samples), strict=True))
    assert row["rank corr. with loss"] == pytest.approx(1)
    assert row["rank corr. with margin"] == pytest.approx(-1)
    assert row["rank corr. with forgetting"] is None
    student, teacher = temperatures.difficulty_chart({0: (Named, samples)}).panels[:2]
    assert np.all(np.diff(student.series[0].y) > 0) and np.all(np.diff(teacher.series[0].y) < 0)
    np.testing.assert_allclose(student.series[0].x, np.arange(5, 100, 10))


def test_summaries_of_another_format_are_named(tmp_path):
    folder = write_run(tmp_path, "run", [1.0])
    row = json.loads((folder / "metrics.jsonl").read_text()) | {"temperature": {"t_student": 3}}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="another format"):
        temperatures.over_epochs(read_run(folder))


# charts and page


NASTY = "a $x^ <script>alert(1)</script> </style> \"'& \x07 ${{%s}} %{y} <b>|_,"


def test_names_of_any_kind_are_drawn_and_escaped(tmp_path):
    panel = Panel(
        NASTY, NASTY, NASTY, [Series(NASTY, 0, [1, 2], [3, 4], text=[NASTY] * 2), Series("b", None, [1], [2])]
    )
    chart = Chart("chart", "Section", NASTY, NASTY, [panel])
    draw(chart, tmp_path, [NASTY])
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "chart.svg").read_text().rstrip().endswith("</svg>")
    write_numbers(chart, tmp_path / "chart.csv")
    rows = list(csv.reader((tmp_path / "chart.csv").open()))
    assert rows[0] == ["panel", "series", "x", "y", "note"]
    assert rows[1][1:4] == [NASTY, "1", "3"]
    folder = write_run(tmp_path, "run", [1.0])
    group = group_runs([read_run(folder)])[0][0]
    group.extra = NASTY
    text = page([group], [results.results_table([group], {})], [chart], [NASTY], "today")
    own = re.sub(r"(?s)<style>.*?</style>|<script>.*?</script>", "", text)
    assert "<script>" not in own and "alert(1)</script>" not in text
    assert escape(NASTY) in own


# the command


def analyze(runs, cwd, *words):
    return tool("analyze", *runs, "-o", cwd / "out", *words, cwd=cwd)


def test_from_runs_to_report(tmp_path, recorded_runs):
    (tmp_path / "published.json").write_text(json.dumps({"DTKD": {"resnet8/resnet8": 61.0}}))
    words = ("--latex", "--markdown", "--published", "published.json")
    runs = [recorded_runs / name for name in ("dtkd-0", "dtkd-1", "kd", "alone", "dtkd-0")]
    done = analyze(runs, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    made = {path.name for path in (out / "figures").iterdir()}
    assert out.stat().st_mode == tmp_path.stat().st_mode | 0o055, "others may read it"
    dtkd = "01-dtkd-resnet8-to-resnet8-3-epochs"
    for name in (
        "curves", "temperature-epochs", "temperature-difficulty", "temperature-persistence", "temperature-classes",
        f"extremes-{dtkd}", "calibration", "agreement", f"correlation-{dtkd}", f"tsne-{dtkd}",
    ):  # fmt: skip
        assert {f"{name}.png", f"{name}.svg", f"{name}.csv"} <= made, name
    assert {path.name for path in out.iterdir()} == {
        "report.html", "figures", "results.csv", "results.tex", "results.md", "temperature.csv",
        "student-and-teacher.csv",
    }  # fmt: skip
    assert "superclass" in done.stdout
    assert "temperature by sample: no temperatures of samples; train with LOG.TEMPERATURE samples" in done.stdout

    (row, *_) = csv.DictReader((out / "results.csv").open())
    lasts = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test_acc"] for run in runs[:2]]
    assert float(row["last (%)"]) == pytest.approx(np.mean(lasts), rel=1e-4)
    assert float(row["last (%), std"]) == pytest.approx(np.std(lasts, ddof=1), rel=1e-4)
    samples = list(csv.DictReader((out / "figures" / f"samples-{dtkd}.csv").open()))
    assert len(samples) == 320 and {"loss", "margin", "forgetting_events", "t_teacher"} <= samples[0].keys()
    curves = list(csv.DictReader((out / "figures" / "curves.csv").open()))
    assert {r["panel"] for r in curves} == {"test accuracy", "training accuracy", "training loss"}

    text = (out / "report.html").read_text()
    assert len(re.findall(r'class="plot', text)) > 15
    outside = re.sub(r"(?s)<script>.*?</script>", "", text)
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", outside), "nothing is fetched"

    again = analyze(runs[3:4], tmp_path)
    assert again.returncode == 0, again.stderr
    assert not (out / "figures" / "temperature-epochs.png").exists(), "no figure of the earlier report stays"
    shutil.rmtree(out / "figures")
    (out / "report.html").write_text("mine")
    assert "holds files that are no report" in analyze(runs[3:4], tmp_path).stderr


def test_what_a_run_lacks_is_left_out(tmp_path, recorded_runs):
    run = tmp_path / "run"
    shutil.copytree(recorded_runs / "kd", run, ignore=shutil.ignore_patterns("student_*", "train.events"))
    done = analyze([run], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no student_latest or student_best" in done.stdout
    made = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"curves.png", "temperature-epochs.png"} <= made
    assert "agreement.png" not in made
    assert "student_latest" in (tmp_path / "out" / "report.html").read_text()

    shutil.copy(recorded_runs / "kd" / "student_latest", run)
    done = analyze([run], tmp_path, "--opts", "DISTILLER.TEACHER_CKPT", "gone.pth")
    assert done.returncode == 0, done.stderr
    assert (
        "no checkpoint of the teacher resnet8 at gone.pth; point to it with --opts DISTILLER.TEACHER_CKPT"
        in done.stdout
    )
    assert (tmp_path / "out" / "figures" / "calibration.png").exists()


def test_what_cannot_work_writes_nothing(tmp_path, recorded_runs, monkeypatch):
    good = recorded_runs / "dtkd-0"
    for name in ("yaml", "foreign", "metrics", "epochs", "record", "weights", "count"):
        shutil.copytree(good, tmp_path / name, ignore=shutil.ignore_patterns("train.events", "epoch_*", "student_?"))
    (tmp_path / "yaml" / "config.yaml").write_text("a: [")
    (tmp_path / "foreign" / "config.yaml").write_text(yaml.safe_dump({"SEED": 1}))
    (tmp_path / "metrics" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    rows = (good / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "epochs" / "metrics.jsonl").write_text(rows[1] + "\n")
    (tmp_path / "record" / "temperatures.bin").write_bytes(b"junk")
    (tmp_path / "weights" / "student_latest").write_bytes(b"junk")
    record_epochs(tmp_path / "count", lambda epoch: np.arange(40.0))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.json").write_text("[1")
    (tmp_path / "odd.json").write_text("[1]")
    before = sorted(path.name for path in tmp_path.iterdir())
    cases = [
        ([tmp_path / "gone"], {}, "is no run's folder"),
        ([tmp_path / "empty"], {}, "is no run's folder"),
        ([tmp_path / "yaml"], {}, "cannot be read"),
        ([tmp_path / "foreign"], {}, "it lacks DEVICE"),
        ([tmp_path / "metrics"], {}, "no epoch of this framework"),
        ([tmp_path / "epochs"], {}, "do not count 1, 2, 3"),
        ([tmp_path / "record"], {}, "is no temperature record"),
        ([tmp_path / "weights"], {}, "is no checkpoint"),
        ([tmp_path / "count"], {}, "holds 40 samples"),
        ([good], {"published": Path("gone.json")}, "gone.json: cannot be read"),
        ([good], {"published": Path("bad.json")}, "is no JSON"),
        ([good], {"published": Path("odd.json")}, "expected"),
        ([good], {"opts": ["DEVICE"]}, "DEVICE lacks its value"),
        ([good], {"out": Path("file")}, "is a file"),
    ]
    monkeypatch.chdir(tmp_path)
    for runs, words, says in cases:
        with pytest.raises(UserError, match=re.escape(says)):
            analyse(runs, **{"out": tmp_path / "out"} | words)
        assert sorted(path.name for path in tmp_path.iterdir()) == before, says
    done = analyze([good], tmp_path, "--opts", "SOLVER.LR", "1")
    assert done.returncode == 2
    assert "'SOLVER.LR' is none of them" in done.stderr and "Traceback" not in done.stderr
