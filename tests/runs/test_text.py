"""Runs on text: their figures, how they go on after a stop, several seeds, what is refused, and what reads them."""

import json
import math
import sysconfig
from pathlib import Path

import pytest
from helpers import called, changed, outcome, same, tree
from studies import write

from mdistiller.bank.text import TextLogits
from mdistiller.bank.topk import TopK
from mdistiller.dataset import load_dataset
from mdistiller.engine.cfg import load
from mdistiller.engine.run import train
from mdistiller.engine.seeds import train_seeds
from mdistiller.errors import RunFailed
from mdistiller.runs import checkpoint
from mdistiller.runs.recorder import read_metrics
from mdistiller.runs.temperature import read_record

FIGURES = {
    "test_acc", "test_loss", "bits_per_byte", "loss_calibrated", "ece", "tokens_per_second", "best_loss", "best_epoch",
}  # fmt: skip
OF_TEACHER = {"teacher_kl", "teacher_agreement"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The folder of a run of two epochs of 3 steps on 5,400 characters of Python's own library, of which there is the
    package json alone, and the YAML file of such runs. The first one trains the teacher.
    """
    root, patch = tmp_path_factory.mktemp("text"), pytest.MonkeyPatch()
    library = Path(sysconfig.get_paths()["stdlib"])
    patch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library / "json")})
    tree = {
        "DATASET": {
            "TYPE": "python", "ROOT": str(root / "data"), "TEXT": {"MEGABYTES": 0.006, "BLOCK": 32},
            "TEST": {"BATCH_SIZE": 5},
        },
        "DISTILLER": {"TYPE": "DTKD", "STUDENT": "gpt1x32", "TEACHER": "gpt2x64"},
        "DTKD": {"T": 1.0, "WARMUP": 0},
        "SOLVER": {
            "TYPE": "AdamW", "LR": 0.003, "SCHEDULE": "cosine", "CLIP": 1.0, "BATCH_SIZE": 64, "EPOCHS": 2,
        },
        "EXPERIMENT": {"TAG": "run"}, "LOG": {"TEMPERATURE": "samples"}, "DEVICE": "cpu",
    }  # fmt: skip
    file = write(root / "text.yaml", **tree)
    with patch.context() as inside:
        inside.chdir(root)
        folder = run(file, root / "out", DISTILLER__TRAIN_TEACHER=True)
    (teacher,) = root.glob("download_ckpts/python_teachers/gpt2x64_vanilla/*.pth")
    tree["DISTILLER"]["TEACHER_CKPT"] = str(teacher)
    yield folder, write(file, **tree)
    patch.undo()


def run(file: Path, prefix: Path, resume: bool | str = False, **changes: object) -> Path:
    """Train. Return the run's folder."""
    return Path(train(load(file, changed([], prefix, **changes)), resume)["folder"])


def test_rows_have_the_figures_of_text(text):
    folder, _ = text
    rows = read_metrics(folder)
    assert len(rows) == 2 and all(FIGURES | OF_TEACHER <= set(row) for row in rows)
    first, last = rows
    assert 2 < last["test_loss"] < first["test_loss"] < math.log(256)
    assert last["bits_per_byte"] == pytest.approx(last["test_loss"] / math.log(2)), "a token is a byte"
    assert last["loss_calibrated"] < last["test_loss"] + 0.01
    assert (last["best_epoch"], last["best_loss"]) == (2, last["test_loss"])
    assert last["teacher_kl"] > 0 and 0 < last["teacher_agreement"] <= 100
    worklog = (folder / "worklog.txt").read_text()
    assert "tokens, a vocabulary of 256" in worklog and "bits/byte" in worklog
    record = read_record(folder / "temperatures.bin")
    tokens = record.values.shape[2]
    assert tokens % 32 == 0 and tokens == pytest.approx(5_400, abs=300), "one for each token"


def test_the_source_of_pythons_library_is_read_without_its_tests(tmp_path, monkeypatch):
    for name in ("a.py", "test/b.py", "c/tests/d.py", "site-packages/e.py", "c/data.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name * 200)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    data = load_dataset("python", tmp_path / "data", load(None, ["DATASET.TEXT.BLOCK", "8"]).DATASET)
    assert bytes(data.train_images[0].tolist()) == b"a.pya.py" and 700 < data.train_images.numel() < 800


def test_the_student_alone_has_no_figures_of_a_teacher(text, tmp_path):
    folder = run(text[1], tmp_path, DISTILLER__TYPE="NONE", SOLVER__EPOCHS=1)
    (row,) = read_metrics(folder)
    assert set(row) >= FIGURES and not OF_TEACHER & set(row)


def test_a_stopped_run_goes_on_to_the_same_bits(text, tmp_path, interrupted):
    whole, file = text
    items = 2, 2, 3  # after step 2 of epoch 1; in its test; after step 1 of epoch 2
    parts = interrupted(lambda resume: run(file, tmp_path, resume), *items)
    assert same(outcome(whole), outcome(parts))
    log = (parts / "worklog.txt").read_text()
    assert [log.count(words) for words in ("3 steps into", "2 steps into", "1 step into")] == [1, 1, 1]
    assert (whole / "temperatures.bin").read_bytes() == (parts / "temperatures.bin").read_bytes()


def test_chunks_give_the_run_of_whole_batches(text, tmp_path):
    whole, parts = (read_metrics(run(text[1], tmp_path / str(n), SOLVER__CHUNK=n)) for n in (0, 500))
    assert parts[-1]["test_loss"] == pytest.approx(whole[-1]["test_loss"], rel=1e-4)


def test_seeds_are_runs_of_their_own(text, tmp_path):
    summary = train_seeds(load(text[1], changed([], tmp_path / "set", SOLVER__EPOCHS=1)), [0, 1])
    folders = [Path(one["folder"]) for one in summary["runs"]]
    losses = [read_metrics(folder)[0]["test_loss"] for folder in folders]
    assert len(losses) == 2 and losses[0] != losses[1]
    assert same(outcome(run(text[1], tmp_path / "alone", SEED=1, SOLVER__EPOCHS=1)), outcome(folders[1]))


def test_a_bank_of_the_largest_logits_serves_any_run(text, tmp_path, monkeypatch):
    """Live, cold and warm give the same student to the bit; another batch size and seed ask no teacher either."""
    kept = {"TEACHER_BANK_TOP_K": 16, "TEACHER_BANK_FOLDER": str(tmp_path / "banks"), "SOLVER__EPOCHS": 1}
    live = run(text[1], tmp_path / "live", **kept)
    assert "none (a bank would not pay" in (live / "worklog.txt").read_text() and not (tmp_path / "banks").exists()
    cold = run(text[1], tmp_path / "cold", **kept, TEACHER_BANK="lazy")
    monkeypatch.setattr(TextLogits, "compare", lambda self: None)  # some blocks, which tell that it is this teacher's
    monkeypatch.setattr(TextLogits, "run_teacher", None)
    warm = run(text[1], tmp_path / "warm", **kept, TEACHER_BANK="lazy")
    assert same(outcome(live), outcome(cold)) and same(outcome(cold), outcome(warm))
    (bank,) = (tmp_path / "banks").iterdir()
    files = sorted(bank.iterdir())
    whole_batches = kept | {"SOLVER__CHUNK": 0, "SOLVER__ACCUMULATE": 2}
    for number, changes in enumerate([{"SEED": 1}, {"SOLVER__BATCH_SIZE": 50}, whole_batches]):
        run(text[1], tmp_path / f"other{number}", **kept | changes, TEACHER_BANK="full")
    assert sorted(bank.iterdir()) == files and list((tmp_path / "banks").iterdir()) == [bank]


def test_whole_rows_of_a_bank_are_the_teachers(text, tmp_path):
    kept = {"TEACHER_BANK_TOP_K": 256, "TEACHER_BANK_DTYPE": "float32", "TEACHER_BANK_FOLDER": str(tmp_path / "banks")}
    bank = run(text[1], tmp_path / "bank", **kept)
    assert "lazy (it saves 50 % of the teacher's passes; a block has 1 view" in (bank / "worklog.txt").read_text()
    whole, off = (read_metrics(folder) for folder in (bank, run(text[1], tmp_path / "off", TEACHER_BANK="off")))
    assert whole[-1]["test_loss"] == pytest.approx(off[-1]["test_loss"], rel=1e-5), "but for the order of sums"


def test_a_step_that_goes_wrong_is_kept_with_dense_logits(text, tmp_path, monkeypatch):
    real = TopK.unpack
    monkeypatch.setattr(TopK, "unpack", lambda self, words: real(self, words).fill_(math.nan))
    with pytest.raises(RunFailed, match="the teacher's logits"):
        run(text[1], tmp_path, TEACHER_BANK_TOP_K=16)
    (file,) = tmp_path.rglob("bad_batch*")
    assert checkpoint.load(file)["logits_teacher"].shape == (64 * 32, 256)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("DISTILLER.TYPE CRD", "compares more than each token's logits"),
        ("DATASET.MIXUP 0.2", "DATASET.MIXUP: is for images, and python is text"),
        ("SOLVER.TRAINER dot SOLVER.TYPE SGD", "set SOLVER.TRAINER base"),
        ("SOLVER.STEP compile", "set SOLVER.STEP auto"),
        ("TEACHER_BANK lazy", "set TEACHER_BANK_TOP_K 64"),
        (
            "DATASET.TYPE digits DISTILLER.TEACHER resnet8 DISTILLER.STUDENT resnet8 TEACHER_BANK_TOP_K 8",
            "TEACHER_BANK_TOP_K: of pictures the largest logits are enough at temperature 1 alone",
        ),
        ("DISTILLER.STUDENT resnet8", "resnet8"),
        ("DATASET.TYPE cifar100 DISTILLER.TEACHER resnet8", "gpt1x32 is one of text; set DATASET.TYPE python or text"),
        ("DATASET.TEXT.BLOCK 100000", "take more text, or DATASET.TEXT.BLOCK below 100000"),
        ("DATASET.TYPE text DATASET.ROOT nowhere", "there is no such file or folder"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(text, tmp_path, words, says):
    done = called("train_ours", "--cfg", text[1], "LOG.PREFIX", "out", *words.split(), cwd=tmp_path)
    line, *more = done.stderr.splitlines()
    assert done.returncode == 2 and says in line and not more
    assert tree(tmp_path) == {}


def test_tools_read_runs_on_text(text, tmp_path):
    folder, root = text[0], text[1].parent  # where the teacher was trained
    last = read_metrics(folder)[-1]
    done = called("eval", "-r", folder, "--json", cwd=root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["student, last", "student, best", "teacher"]
    own = found["student, last"]
    for key in ("bits_per_byte", "loss_calibrated", "ece", "teacher_kl", "teacher_agreement"):
        assert own[key] == pytest.approx(last[key], rel=1e-4), key
    assert own["loss"] == pytest.approx(last["test_loss"], rel=1e-5) and own["tokens_per_second"] > 0
    assert "teacher_kl" not in found["teacher"]
    table = called("eval", "-r", folder, "DATASET.TEXT.TEST", "test", cwd=root).stdout
    assert all(name in table for name in ("bits/byte", "calibrated loss", "ECE (%)", "KL to teacher", "tokens/s"))
    assert f"{last['test_loss']:.4f}" not in table, "another part"
    words = ["-m", "gpt1x32", "-c", folder / "student_best", "-d", "python"]
    keys = ["DATASET.TEXT.MEGABYTES", "0.006", "DATASET.TEXT.BLOCK", "32"]
    one = json.loads(called("eval", *words, *keys, "--json", cwd=root).stdout)["gpt1x32"]
    assert one["loss"] == pytest.approx(own["loss"], rel=1e-5) and "teacher_kl" not in one
    compared = called("compare", folder, cwd=root).stdout
    assert f"{last['test_loss']:.4f}" in compared and "best bits/byte" in compared.replace("\n", " ")
    for name, *rest, says in (
        ("eval", "-r", folder, "--out", tmp_path / "out", "--out: writes accuracy by class, and python is text"),
        ("eval", *words, "--out", tmp_path / "out", "--out: writes accuracy by class, and python is text"),
        ("export", folder / "student_best", "python is text, and this is for images"),
    ):
        refusal = called(name, *rest, cwd=root)
        assert refusal.returncode == 2 and says in refusal.stderr and refusal.stderr.count("\n") == 1
    assert tree(tmp_path) == {}


def test_a_report_of_runs_on_text_has_their_record(text, tmp_path):
    done = called("analyze", text[0], "-o", tmp_path / "report", cwd=text[1].parent)
    assert done.returncode == 0, done.stderr
    assert "python is text, and this is for images" in done.stdout
    names = {path.name for path in (tmp_path / "report" / "figures").iterdir()}
    assert any("temperature" in name for name in names) and any(name.startswith("samples-") for name in names), names
    assert "bits/byte" in (tmp_path / "report" / "report.html").read_text()


def test_a_folder_of_transformers_teaches_another(text, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, width in (("teacher", 32), ("student", 16)):
        config = transformers.GPT2Config(vocab_size=256, n_positions=32, n_embd=width, n_layer=1, n_head=2)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    networks = {f"DISTILLER__{name.upper()}": f"hf:{tmp_path / name}" for name in ("teacher", "student")}
    networks |= {"DISTILLER__TEACHER_CKPT": "pretrained", "EXPERIMENT__NAME": "short"}  # paths make a long name
    rows = read_metrics(run(text[1], tmp_path / "out", **networks))
    assert rows[1]["test_loss"] < rows[0]["test_loss"] < math.log(256)
    assert OF_TEACHER <= rows[1].keys()
