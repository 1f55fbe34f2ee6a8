"""Broken and hostile inputs through the commands that users type: one line, status 2, nothing run, nothing written.

What every reader of files does with a pipe, a device or a folder is tested once, in unit/test_files.py; what YAML may
hold in unit/test_config.py; weights and arrays of the wrong kind in unit/test_checkpoint.py and test_dataset.py.
"""

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import sklearn.datasets
import torch
from helpers import ROOT, Bomb, called, digits_opts, load_tool
from methods import model

from mdistiller import registry
from mdistiller.engine.cfg import load
from mdistiller.engine.trainer import Trainer
from mdistiller.errors import run_command

EVALUATE = ["eval", "-m", "resnet8", "-d", "digits", "-c", "x.pth"]
TRAIN = ["train_ours", *digits_opts(), "LOG.PREFIX", "out"]
DISTIL = [*TRAIN, "DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT", "x.pth"]
NPZ = [*TRAIN, "DATASET.TYPE", "npz", "DATASET.ROOT", "x.npz"]
CIFAR = [*TRAIN, "DATASET.TYPE", "cifar100", "DATASET.ROOT", "."]
COCO = [*TRAIN, "DATASET.TYPE", "coco", "DATASET.ROOT", ".", "DISTILLER.STUDENT", "fasterrcnn_resnet8"]
YAML = ["train_ours", "--cfg", "x.yaml", *digits_opts(), "LOG.PREFIX", "out"]
PLUGIN = [*TRAIN, "EXPERIMENT.PLUGINS", "mine.py"]
OF_AT = ["DISTILLER.TYPE", "AT"]
COMPARE, ANALYZE = ["compare", "run"], ["analyze", "run", "-o", "out"]


def saved(state):
    """The content of a file: what `state()` returns, saved when a test needs it."""
    return lambda path: torch.save(state(), path)


@cache
def weights(*given):
    return model(*given).state_dict()


TWO_RULES = ["--logit-stand", "TEMPERATURE.RULE", "norm"]
# {case: (file, its content or what makes it, command, words of the line)}
FILES = {
    "weights of another network": ("x.pth", saved(lambda: weights("resnet14")), EVALUATE, "holds resnet14"),
    "weights of other classes": ("x.pth", saved(lambda: weights("resnet8", 100)), EVALUATE, "with 100 classes"),
    "weights that run": ("x.pth", saved(Bomb), EVALUATE, "x.pth"),
    "weights cut": ("x.pth", lambda path: (torch.save(weights(), path), os.truncate(path, 50_000)), EVALUATE, "x.pth"),
    "weights that are a pipe": ("x.pth", os.mkfifo, EVALUATE, "x.pth"),
    "teacher of other classes": ("x.pth", saved(lambda: weights("resnet8", 100)), DISTIL, "with 100 classes"),
    "teacher that is a folder": ("x.pth", os.mkdir, DISTIL, "x.pth"),
    "teacher of two rules": ("x.pth", saved(weights), [*DISTIL, *TWO_RULES], "EXPERIMENT.LOGIT_STAND is the rule std"),
    "npz that is a device": ("x.npz", lambda path: path.symlink_to("/dev/zero"), NPZ, "x.npz"),
    "cifar100 without a test file": ("train.bin", bytes(3074), CIFAR, "test.bin"),
    "cifar100 that is a pipe": ("train.bin", os.mkfifo, CIFAR, "train.bin"),
    "coco without pictures": ("train.json", b"{}", COCO, "has no folder of training pictures"),
    "yaml that is a pipe": ("x.yaml", os.mkfifo, YAML, "x.yaml"),
    "yaml that runs": ("x.yaml", b"!!python/object/apply:os.mkdir ['bomb']", YAML, "x.yaml"),
    "yaml with an unknown key": ("x.yaml", b"SOLVER: {LRR: 1}", YAML, "did you mean SOLVER.LR?"),
    "plug-in that is missing": ("y", b"", PLUGIN, "'mine.py' is neither an existing .py file nor a folder"),
    "plug-in that is a pipe": ("mine.py", os.mkfifo, PLUGIN, "EXPERIMENT.PLUGINS"),
    "plug-in not UTF-8": ("mine.py", b"x = '\xe9'\n", PLUGIN, "mine.py fails"),
    "plug-in with a NUL": ("mine.py", b"x = 1\0\n", PLUGIN, "mine.py fails"),
    "plug-in that is no Python": ("mine.py", b"def f(:\n", PLUGIN, "mine.py fails"),
    "plug-in that raises": ("mine.py", b"raise ValueError('two\\nlines')", PLUGIN, r"two\nlines"),
    "plug-in that exits": ("mine.py", b"import sys\nsys.exit(0)", PLUGIN, "mine.py fails"),
    "plug-in that raises its own": ("mine.py", b"class Stop(BaseException): pass\nraise Stop", PLUGIN, "mine.py fails"),
}  # fmt: skip


@cache
def config():
    return load(None, digits_opts(DISTILLER__TYPE="KD", DISTILLER__TEACHER="resnet8")).dump()


ROW = {"epoch": 1, "test_acc": 50.0, "best_acc": 50.0, "train_acc": 50.0, "train_loss": 1.0, "best_epoch": 1}


def rows(**changes):
    return json.dumps(ROW | changes) + "\n"


def header(samples):
    fields = ["t_student", "t_teacher", "max_student", "max_teacher"]
    data = {"format": 1, "samples": samples, "dtype": "<f2", "fields": fields}
    return json.dumps(data).encode().ljust(4096) + bytes(800)


# the same, of one file in a run's folder
RUNS = {
    "metrics missing": ("metrics.jsonl", None, COMPARE, "run: "),
    "metrics that are a pipe": ("metrics.jsonl", os.mkfifo, COMPARE, "run: "),
    "metrics not JSON": ("metrics.jsonl", "epoch 1\n", COMPARE, "run: "),
    "metrics a list": ("metrics.jsonl", "[1, 2]\n", COMPARE, "run: "),
    "metrics NaN": ("metrics.jsonl", rows(test_acc=float("nan")), COMPARE, "metrics.jsonl"),
    "metrics text": ("metrics.jsonl", rows(best_acc="high"), COMPARE, "metrics.jsonl"),
    "metrics of 5,000 digits": ("metrics.jsonl", rows().replace("50.0", "5" * 5000), ANALYZE, "run: no epoch"),
    "metrics nested deep": ("metrics.jsonl", "[" * 100_000 + "\n", ANALYZE, "run: no epoch"),
    "metrics not UTF-8": ("metrics.jsonl", b"\xff\xfe\n", ANALYZE, "run: no epoch"),
    "config missing": ("config.yaml", None, COMPARE, "run: "),
    "config a folder": ("config.yaml", os.mkdir, COMPARE, "run: "),
    "config not YAML": ("config.yaml", "SOLVER: {", COMPARE, "config.yaml"),
    "config empty": ("config.yaml", "", ANALYZE, "config.yaml"),
    "student that is text": ("student_latest", "text", ANALYZE, "student_latest"),
    "record of -5 samples": ("temperatures.bin", header(-5), ANALYZE, "temperatures.bin"),
    "record of NaN samples": ("temperatures.bin", header(float("nan")), ANALYZE, "temperatures.bin"),
}  # fmt: skip

# {case: (command, words of the line)}
COMMANDS = {
    "a key without a value": ([*TRAIN, "SEED"], "'SEED' has no value"),
    "an unknown option": ([*TRAIN, "--lr", "3"], "--lr"),
    "a set": ([*TRAIN, "SEED", "{1}"], "SEED"),
    "a call": ([*TRAIN, "SOLVER.LR", "__import__('os').mkdir('bomb')"], "SOLVER.LR"),
    "brackets": ([*TRAIN, "SOLVER.LR_DECAY_STAGES", "[" * 50_000], "SOLVER.LR_DECAY_STAGES"),
    "digits": ([*TRAIN, "SEED", "9" * 5000], "SEED"),
    "no key": ([*TRAIN, "", "1"], "unknown"),
    "no text": ([*TRAIN, "EXPERIMENT.TAG", "a\udcffb"], "EXPERIMENT.TAG"),
    "two lines": ([*TRAIN, "a\nb", "1"], r"a\nb"),
    "a long name": ([*EVALUATE[:-1], "a" * 5000], "aaa"),
    "no such GPU": ([*TRAIN, "DEVICE", "cuda:77"], "DEVICE"),
    "fp16 on a CPU": ([*TRAIN, "SOLVER.AMP", "fp16"], "fp16 needs CUDA"),
    "no such model": (["eval", "-m", "resnet9", "-c", "x", "-d", "digits"], "did you mean resnet"),
    "no such data": (["eval", "-m", "resnet8", "-c", "x", "-d", "digit"], "did you mean digits?"),
    "nothing to evaluate": (["eval"], "say what to evaluate: -r RUN, or -m MODEL"),
    "no data": (["eval", "-m", "resnet8", "-c", "x", "-d", "npz", "--root", "no.npz"], "file itself as --root"),
    "no run": (["eval", "-r", "nowhere"], "nowhere: is no run's folder"),
    "a file for a folder": ([*EVALUATE, "--out", "/dev/null"], "is a file; name a folder of yours"),
    "a configuration without --cfg": (["train_ours", "digits.yaml", "SEED", "1"], "type --cfg digits.yaml"),
    "a run and its data": (["eval", "-r", "nowhere", "-d", "digits"], "-r RUN says model, checkpoint and data set"),
    "no such user": (["eval", "-m", "resnet8", "-c", "x", "-d", "npz", "-r", "~nosuchuser/x"], "~nosuchuser"),
    "no teacher of that name": ([*EVALUATE[:-1], "pretrain"], "digits_teachers/resnet8_vanilla"),
    "no batch": ([*EVALUATE, "-bs", "-5"], "-bs"),
    "no device of torch": ([*EVALUATE, "--device", "meta"], "DEVICE"),
    "no such run": (["compare", "gone"], "gone"),
    "no seed": ([*TRAIN, "--seeds"], "no seed follows"),
    "seeds twice": ([*TRAIN, "--seeds", "0", "--seeds", "1"], "given twice"),
    "seeds of one letter less": ([*TRAIN, "--seed", "3"], "unknown option --seed"),
    "a long range of seeds": ([*TRAIN, "--seeds", "0-5000"], "1,000 at most"),
    "a range from its end": ([*TRAIN, "--seeds", "3-1"], "the smaller one first"),
    "a large seed": ([*TRAIN, "--seeds", "4294967296"], "2**32"),
    "half a seed": ([*TRAIN, "--seeds=1.5"], "is no seed"),
    "a negative seed": ([*TRAIN, "--seeds", "0", "-1"], "--seeds: -1 is no seed; write --seeds 0,1,2"),
    "many ranges": ([*TRAIN, "--seeds", "0-999", "1000-1999"], "2,000, and 1,000 at most"),
    "seeds and a seed": ([*TRAIN, "--seeds", "0", "1", "SEED", "3"], "give one of them"),
    "seeds and wandb": ([*TRAIN, "--seeds", "0", "LOG.WANDB", "True"], "LOG.WANDB False"),
    "a prefix nobody can write to": ([*TRAIN, "LOG.PREFIX", "/proc/nowhere"], "set LOG.PREFIX"),
    "nothing to resume": ([*TRAIN, "--resume"], "there is no run in"),
    "a warm temperature": ([*DISTIL, "--base-temp", "warm"], "KD.TEMPERATURE: must be a number"),
    "no temperature at all": ([*DISTIL, "--base-temp", "0"], "KD.TEMPERATURE: must be greater than 0"),
    "much weight": ([*DISTIL, "--kd-weight", "much"], "--kd-weight: must be a number; got 'much'"),
    "AT's temperature": ([*DISTIL, "--base-temp", "2", *OF_AT], "--base-temp: AT has no temperature"),
    "AT's weight": ([*DISTIL, "--kd-weight", "2", *OF_AT], "--kd-weight: AT has no weight"),
    "logits of nobody": ([*TRAIN, "--logit-stand", "DISTILLER.TYPE", "NONE"], "--logit-stand: NONE has no temperature"),
    "more stands": ([*DISTIL, "--logit-stands"], "unknown option --logit-stands"),
    "a key that cannot move": (["analyze", "x", "-o", "out", "--opts", "SOLVER.LR", "1"], "--opts"),
}  # fmt: skip


load_digits = cache(sklearn.datasets.load_digits)  # the same for every case


tool_of = cache(load_tool)


def names(folder):
    """Every name below `folder`, with kind, size and time of change."""
    return {str(p): (s.st_mode, s.st_size, s.st_mtime_ns) for p in folder.rglob("*") for s in [p.lstat()]}


def write(path, content):
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_run(folder):
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(config())
    (folder / "run" / "metrics.jsonl").write_text(rows())


def check_refusal(stderr, says):
    lines = [line for line in stderr.splitlines() if not line.startswith("run: the ")]  # the progress of analyze.py
    assert len(lines) == 1, stderr[:3000]
    assert lines[0].startswith("error: ") and len(lines[0]) < 1100
    assert says in lines[0]


def check_refused(folder, monkeypatch, capsys, words, says):
    """The command ends with one line and status 2, has begun no training and written nothing."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(registry.distillers, "data", dict(registry.distillers.data))
    monkeypatch.setattr(sklearn.datasets, "load_digits", load_digits)
    monkeypatch.setattr(Trainer, "fit", lambda *_: pytest.fail("training began"))
    before = names(folder)
    with pytest.raises(SystemExit) as ended:
        run_command(tool_of(words[0]).main)
    assert ended.value.code == 2
    check_refusal(capsys.readouterr().err, says)
    assert names(folder) == before


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file(tmp_path, monkeypatch, capsys, case):
    name, content, words, says = FILES[case]
    write(tmp_path / name, content)
    check_refused(tmp_path, monkeypatch, capsys, words, says)


@pytest.mark.parametrize("case", RUNS)
def test_a_bad_run(tmp_path, monkeypatch, capsys, case):
    name, content, words, says = RUNS[case]
    write_run(tmp_path)
    (tmp_path / "run" / name).unlink(missing_ok=True)
    write(tmp_path / "run" / name, content)
    check_refused(tmp_path, monkeypatch, capsys, words, says)


@pytest.mark.parametrize("case", COMMANDS)
def test_a_bad_command(tmp_path, monkeypatch, capsys, case):
    check_refused(tmp_path, monkeypatch, capsys, *COMMANDS[case])


def test_a_report_onto_a_file(tmp_path, monkeypatch, capsys):
    write_run(tmp_path)
    (tmp_path / "out").touch()
    check_refused(tmp_path, monkeypatch, capsys, ANALYZE, "-o out")


def test_a_reader_that_stops_early_ends_a_tool_quietly(tmp_path):
    """In a process of its own, where nothing is caught by the test's."""
    write_run(tmp_path)
    command = [sys.executable, str(ROOT / "tools" / "compare.py"), "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


def test_a_folder_whose_name_is_no_text_is_read(tmp_path):
    write_run(tmp_path)
    (tmp_path / "run").rename(tmp_path / os.fsdecode(b"r\xffn"))
    done = called("compare", os.fsdecode(b"r\xffn"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "r n " in done.stdout
