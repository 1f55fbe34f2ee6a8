"""The teacher's logits ahead of the step, in a bank or not: the same numbers, and never another teacher's."""

import json
import math
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import agree, cases, changed, on, outcome, run, same, save_teacher

from mdistiller import config
from mdistiller.bank import teacher
from mdistiller.bank.inference import Inference
from mdistiller.bank.store import RowStore
from mdistiller.bank.teacher import TeacherLogits, choose
from mdistiller.dataset import Batches
from mdistiller.distillers import LogitDistiller, distiller_dict
from mdistiller.engine import build
from mdistiller.errors import Preempted, RunFailed, UserError
from mdistiller.models import cifar_model_dict

config.load()
LOGIT_METHODS = sorted(
    name
    for name, cls in distiller_dict.items()
    if issubclass(cls, LogitDistiller) and cls.__module__.startswith("mdistiller.")
)
CPU = torch.device("cpu")


def batches(augment="crop_flip", n=6, size=32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator)
    return Batches(images, torch.arange(n), (0.5,) * 3, (0.25,) * 3, 4, CPU, augment)


@pytest.mark.parametrize(("augment", "views"), [("crop_flip", 162), ("crop", 81), ("none", 1)])
def test_every_view_has_its_number(augment, views):
    data = batches(augment)
    assert data.views == views
    numbers = torch.arange(6 * views)
    assert torch.equal(data.row_numbers(data.plan_of(numbers)), numbers)
    plan = data.plan(3)
    again = data.plan_of(data.row_numbers(plan))
    assert torch.equal(again, plan)
    assert data.row_numbers(plan).max() < 6 * views


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("name", ["resnet8", "vgg8", "wrn_16_1", "MobileNetV2", "ShuffleV2"])
def test_a_row_does_not_depend_on_what_it_is_computed_with(name, amp):
    torch.manual_seed(0)
    data = batches()
    logits = TeacherLogits(data, Inference(cifar_model_dict[name][0](num_classes=10).eval(), CPU, amp))
    rows = torch.randperm(6 * 162)[:70]
    together = torch.cat(list(logits.compute(rows)))
    alone = torch.cat([part for row in rows[[0, 1, 33, 69]] for part in logits.compute(row[None])])
    assert torch.equal(together[[0, 1, 33, 69]], alone)
    assert together.dtype == torch.float16


@pytest.fixture(scope="module")
def expected(small, tmp_path_factory):
    """What a run comes to without a bank, by method and device."""
    known = {}

    def get(method, device="cpu"):
        if (method, device) not in known:
            opts = [*on(device, small), "DISTILLER.TYPE", method]
            known[method, device] = outcome(run(opts, tmp_path_factory.mktemp(method), TEACHER_BANK="auto"))
        return known[method, device]

    return get


@pytest.mark.parametrize(("method", "device"), cases(LOGIT_METHODS, ("KD", "DTKD", "DKD")))
def test_a_bank_changes_no_bit(small, tmp_path, expected, method, device):
    opts = [*on(device, small), "DISTILLER.TYPE", method, "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    cold = outcome(run(opts, tmp_path / "cold", TEACHER_BANK="lazy"))
    (bank,) = (tmp_path / "banks").iterdir()
    size = (bank / "rows.bin").stat().st_size
    warm = outcome(run(opts, tmp_path / "warm", TEACHER_BANK="lazy"))
    assert agree(cold, expected(method, device), device)
    assert agree(warm, expected(method, device), device)
    assert (bank / "rows.bin").stat().st_size == size, "the second run met the views of the first"


@pytest.mark.parametrize(("method", "device"), cases(["DTKD"], ("DTKD",)))
def test_a_full_bank_changes_no_bit_and_needs_no_teacher(small, tmp_path, expected, monkeypatch, method, device):
    opts = [*on(device, small), "DISTILLER.TYPE", method, "TEACHER_BANK", "full"]
    opts += ["TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    assert agree(outcome(run(opts, tmp_path / "cold")), expected(method, device), device)
    monkeypatch.setattr(TeacherLogits, "compare", lambda self: None)  # some rows, which tell that it is this teacher's
    monkeypatch.setattr(TeacherLogits, "compute", None)
    assert agree(outcome(run(opts, tmp_path / "warm")), expected(method, device), device)
    assert same(outcome(run(opts, tmp_path / "other seed", SEED=7))[1][0]["epoch"], 1), "nor does another seed"


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("method", ["KD", "DTKD", "DKD"])
def test_losses_with_and_without_agree_to_the_stored_precision(small, tmp_path, method, dtype, amp):
    """One step: further on, a difference of rounding grows as chaos has it."""
    opts = [*small, "DISTILLER.TYPE", method, "SOLVER.BATCH_SIZE", "40", "SOLVER.EPOCHS", "1", "SOLVER.AMP", amp]
    losses = []
    for place, bank in (("off", "off"), ("bank", "full")):
        folder = run(opts, tmp_path / place, TEACHER_BANK=bank, TEACHER_BANK_DTYPE=dtype,
                     TEACHER_BANK_FOLDER=tmp_path / "banks")  # fmt: skip
        losses.append(outcome(folder)[1][0]["train_loss"])
    tolerance = 2e-2 if amp == "bf16" else {"float16": 1e-3, "float32": 1e-5}[dtype]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@pytest.mark.parametrize("method", ["NONE", "FITNET", "RKD", "REVIEWKD"])
def test_other_methods_run_their_teacher_as_ever(small, tmp_path, method):
    folder = run([*small, "DISTILLER.TYPE", method], tmp_path, TEACHER_BANK="full",
                 TEACHER_BANK_FOLDER=tmp_path / "banks")  # fmt: skip
    assert not (tmp_path / "banks").exists()
    said = f"teacher bank: none ({method} needs more of its teacher than logits)"
    assert (said in (folder / "worklog.txt").read_text()) == (method != "NONE")


def test_a_plugin_that_runs_its_teacher_itself_is_left_alone(small, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import torch\nfrom mdistiller.distillers.KD import KD, kd_loss\n"
        "from mdistiller.distillers import register_distiller\n"
        "@register_distiller('OWNPASS', defaults={'A': 1.0})\nclass OwnPass(KD):\n"
        "    def forward_train(self, image, target, **kwargs):\n"
        "        v, _ = self.student(image)\n"
        "        with torch.no_grad():\n            u, _ = self.teacher(image)\n"
        "        return v, {'kd': kd_loss(v, u, 4.0)}\n"
    )
    opts = [*small, "EXPERIMENT.PLUGINS", str(plugin), "DISTILLER.TYPE", "OWNPASS", "TEACHER_BANK", "full"]
    folder = run(opts, tmp_path, TEACHER_BANK_FOLDER=tmp_path / "banks")
    assert not (tmp_path / "banks").exists()
    assert np.isfinite(outcome(folder)[1][-1]["train_loss"])


def bank_of(opts, tmp_path, **changes):
    """The folder of the bank that a run makes."""
    run(opts, tmp_path / "run", TEACHER_BANK="lazy", TEACHER_BANK_FOLDER=tmp_path / "banks", SOLVER__EPOCHS=1,
        **changes)  # fmt: skip
    (folder,) = (tmp_path / "banks").iterdir()
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [("SOLVER__AMP", "bf16"), ("DATASET__AUGMENT", "crop_flip"), ("TEACHER_BANK_DTYPE", "float32"), ("teacher", 2)],
)
def test_a_bank_is_of_one_teacher_one_augmentation_one_precision(small, tmp_path, key, value):
    opts = [*small, "DISTILLER.TYPE", "KD"]
    first = bank_of(opts, tmp_path / "a")
    if key == "teacher":
        torch.manual_seed(value)
        file = tmp_path / "teacher"
        torch.save({"model": cifar_model_dict["resnet14"][0](num_classes=10).state_dict()}, file)
        second = bank_of(opts, tmp_path / "b", DISTILLER__TEACHER_CKPT=file)
    else:
        second = bank_of(opts, tmp_path / "b", **{key: value})
    assert first.name != second.name
    assert bank_of(opts, tmp_path / "c", SEED=5, SOLVER__BATCH_SIZE=8, DISTILLER__TYPE="DTKD").name == first.name


def test_a_bank_under_another_ones_name_is_refused(small, tmp_path):
    opts = [*small, "DISTILLER.TYPE", "KD"]
    first = bank_of(opts, tmp_path / "a")
    second = bank_of(opts, tmp_path / "b", SOLVER__AMP="bf16")
    shutil.rmtree(second)
    shutil.copytree(first, second)
    with pytest.raises(UserError, match="precision"):
        bank_of(opts, tmp_path / "b", SOLVER__AMP="bf16")


def test_another_run_beside_it_reads_what_is_there(small, tmp_path, expected, capsys):
    opts = [*small, "DISTILLER.TYPE", "DTKD"]
    folder = bank_of(opts, tmp_path)
    size = (folder / "rows.bin").stat().st_size
    cfg = config.load(None, changed(opts, tmp_path))
    common = build.Workspace(cfg)
    distiller = build.build_distiller(cfg, common.data, None, CPU)
    trainer, _ = build.build_trainer(cfg, distiller, common, tmp_path / "x")
    assert trainer.teacher is None, "a teacher that is in no file has no bank"
    header = json.loads((folder / "header.json").read_text())
    with RowStore(folder, *(header[key] for key in ("description", "rows", "width", "dtype"))):
        again = run(opts, tmp_path / "again", TEACHER_BANK="lazy", TEACHER_BANK_FOLDER=tmp_path / "banks")
    assert same(outcome(again), expected("DTKD"))
    assert "only reads" in capsys.readouterr().out
    assert (folder / "rows.bin").stat().st_size == size


def reopened(folder):
    header = json.loads((folder / "header.json").read_text())
    return RowStore(folder, *(header[key] for key in ("description", "rows", "width", "dtype")))


def clock(sleep):
    """In place of the module `time`, for one module: other threads sleep too."""
    return SimpleNamespace(sleep=sleep, monotonic=time.monotonic)


def test_a_full_one_does_not_wait_for_a_run_that_adds_what_it_meets(small, tmp_path, expected, monkeypatch, capsys):
    opts = [*small, "DISTILLER.TYPE", "DTKD", "TEACHER_BANK", "full", "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    monkeypatch.setattr(teacher, "time", clock(lambda seconds: pytest.fail("it waits")))
    with reopened(bank_of(opts[:-4], tmp_path)) as store:
        store.announce("lazy")
        again = run(opts, tmp_path / "again")
    assert same(outcome(again), expected("DTKD"))
    assert capsys.readouterr().out.count("this one computes what is missing") == 1


@pytest.mark.parametrize("work", ["full", ""])
def test_a_full_one_waits_for_another_that_fills(small, tmp_path, expected, monkeypatch, capsys, work):
    """And fills it itself where that one has ended."""
    opts = [*small, "DISTILLER.TYPE", "DTKD", "TEACHER_BANK", "full", "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    folder = bank_of(opts[:-4], tmp_path)
    store = reopened(folder)
    store.announce(work)
    monkeypatch.setattr(teacher, "time", clock(lambda seconds: store.close()))
    assert same(outcome(run(opts, tmp_path / "again")), expected("DTKD"))
    assert capsys.readouterr().out.count("waiting for it") == 1
    with reopened(folder) as store:
        assert store.complete


def test_a_bank_that_cannot_be_written_is_read_and_not_waited_for(small, tmp_path, expected, monkeypatch, capsys):
    def refused(self):
        raise PermissionError(13, "Permission denied")

    opts = [*small, "DISTILLER.TYPE", "DTKD", "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    bank_of(opts[:-2], tmp_path)
    monkeypatch.setattr(RowStore, "_take_lock", refused)
    with pytest.raises(UserError, match="not complete and cannot be written; set TEACHER_BANK_FOLDER"):
        run(opts, tmp_path / "full", TEACHER_BANK="full")
    assert not (tmp_path / "full").exists()
    assert same(outcome(run(opts, tmp_path / "lazy", TEACHER_BANK="lazy")), expected("DTKD"))
    assert "it is only read" in capsys.readouterr().out
    monkeypatch.setattr(teacher, "choose", lambda *given: teacher.Choice("full", "as on CUDA"))
    assert same(outcome(run(opts, tmp_path / "auto")), expected("DTKD"))
    assert "teacher bank: none (" in capsys.readouterr().out


def test_a_full_disk_while_it_is_filled_names_the_banks_folder(small, tmp_path, monkeypatch):
    def full(self, rows, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RowStore, "_append", full)
    opts = [*small, "DISTILLER.TYPE", "KD", "TEACHER_BANK", "full", "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    with pytest.raises(RunFailed, match="banks/teacher.bank-.*: No space left on device; what it holds stays"):
        run(opts, tmp_path)


def test_a_checkpoint_with_a_long_name_has_a_bank(small, tmp_path):
    file = save_teacher(tmp_path / f"{'é' * 125}.pth", "resnet14")
    folder = bank_of([*small, "DISTILLER.TYPE", "KD", "DISTILLER.TEACHER_CKPT", str(file)], tmp_path)
    assert len(folder.name.encode()) <= 255


def test_an_interrupted_precomputation_goes_on(small, tmp_path, expected, monkeypatch):
    opts = [*small, "DISTILLER.TYPE", "DTKD", "TEACHER_BANK", "full", "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    passes = []
    real = TeacherLogits.compute

    def counted(self, rows, check=lambda: None):
        for part in real(self, rows, check):
            passes.append(len(part))
            if len(passes) == 5:
                self_stop.signal = "SIGTERM"
            yield part

    class Kept(builder.Stop):
        def __init__(self):
            super().__init__()
            nonlocal self_stop
            self_stop = self

    self_stop = None
    monkeypatch.setattr(builder, "Stop", Kept)
    monkeypatch.setattr(TeacherLogits, "compute", counted)
    monkeypatch.setattr(teacher, "BLOCK", 128)  # two whole ones are done by then
    monkeypatch.setattr(TeacherLogits, "compare", lambda self: None)  # which asks the teacher too
    with pytest.raises(Preempted, match="SIGTERM"):
        run(opts, tmp_path)
    assert len(passes) == 5
    monkeypatch.setattr(builder, "Stop", builder.Stop.__mro__[1])
    folder = run(opts, tmp_path, resume="auto")
    assert same(outcome(folder), expected("DTKD"))
    assert sum(passes) == 40 * 81, "no view came twice"


def test_a_teacher_whose_code_has_changed_is_noticed(small, tmp_path, monkeypatch):
    opts = [*small, "DISTILLER.TYPE", "KD"]
    bank_of(opts, tmp_path / "a")
    real = teacher.Inference.__call__
    monkeypatch.setattr(teacher.Inference, "__call__", lambda self, image: 1.1 * real(self, image))
    before = sorted((tmp_path / "a" / "run").rglob("*"))
    with pytest.raises(UserError, match="other logits than this teacher gives"):
        run(opts, tmp_path / "a" / "run", TEACHER_BANK="lazy", TEACHER_BANK_FOLDER=tmp_path / "a" / "banks")
    assert sorted((tmp_path / "a" / "run").rglob("*")) == before
    monkeypatch.setattr(teacher, "choose", lambda *given: pytest.fail("it was compared too late"))
    folder = run(opts, tmp_path / "auto", TEACHER_BANK_FOLDER=tmp_path / "a" / "banks")
    assert "teacher bank: none" in (folder / "worklog.txt").read_text()


@pytest.mark.parametrize("how", ["learns", "moves", "trains"])
def test_a_teacher_that_changes_is_not_asked_ahead(small, tmp_path, how):
    body = {
        "learns": "    def get_learnable_parameters(self):\n"
        "        return [*super().get_learnable_parameters(), *self.teacher.parameters()]\n",
        "moves": "    def losses(self, *args, **kwargs):\n        with torch.no_grad():\n"
        "            self.teacher.fc.bias += 1\n        return super().losses(*args, **kwargs)\n",
        "trains": "    def train(self, mode=True):\n        super().train(mode)\n        self.teacher.train(mode)\n"
        "        return self\n",
    }[how]
    plugin = tmp_path / f"changing_{how}.py"
    plugin.write_text(
        "import torch\nfrom mdistiller.distillers.KD import KD\nfrom mdistiller.distillers import register_distiller\n"
        f"@register_distiller('CHANGING_{how.upper()}', defaults={{'A': 1.0}})\nclass Changing(KD):\n{body}"
    )
    opts = [*small, "EXPERIMENT.PLUGINS", str(plugin), "DISTILLER.TYPE", f"CHANGING_{how.upper()}"]
    if how == "moves":
        with pytest.raises(RunFailed, match="set TEACHER_BANK off"):
            run(opts, tmp_path)
        run(opts, tmp_path, TEACHER_BANK="off")
    else:
        folder = run(opts, tmp_path, TEACHER_BANK="lazy", TEACHER_BANK_FOLDER=tmp_path / "banks")
        assert not (tmp_path / "banks").exists()
        assert "needs more of its teacher" in (folder / "worklog.txt").read_text()


def test_what_auto_leaves_alone_stays_open_to_others(small, tmp_path, expected):
    opts = [*small, "DISTILLER.TYPE", "DTKD"]
    folder = bank_of(opts, tmp_path, SEED=9)
    header = json.loads((folder / "header.json").read_text())
    ask = TeacherLogits.__call__

    def another_takes_it(self, *args):
        with RowStore(folder, *(header[key] for key in ("description", "rows", "width", "dtype"))) as store:
            assert store.writable
        return ask(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherLogits, "__call__", another_takes_it)
        again = run(opts, tmp_path / "again", TEACHER_BANK="auto", TEACHER_BANK_FOLDER=tmp_path / "banks")
    assert same(outcome(again), expected("DTKD"))


def test_a_damaged_bank_stops_only_who_asks_for_it(small, tmp_path, expected, capsys):
    opts = [*small, "DISTILLER.TYPE", "DTKD", "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    folder = bank_of([*small, "DISTILLER.TYPE", "DTKD"], tmp_path)
    (folder / "header.json").write_text("{")
    assert same(outcome(run(opts, tmp_path / "auto")), expected("DTKD"))
    assert "teacher bank: none" in capsys.readouterr().out
    with pytest.raises(UserError):
        run(opts, tmp_path / "lazy", TEACHER_BANK="lazy")


def test_a_run_of_before_the_bank_goes_on_with_its_own_teacher(small, tmp_path):
    opts = [*small, "DISTILLER.TYPE", "KD"]
    folder = run(opts, tmp_path, TEACHER_BANK="off", SOLVER__EPOCHS=1)
    file = folder / "config.yaml"
    file.write_text("\n".join(line for line in file.read_text().splitlines() if "TEACHER_BANK" not in line))
    with pytest.raises(UserError, match="TEACHER_BANK is 'auto', but this run was started with 'off'"):
        run(opts, tmp_path, resume=True)
    run(opts, tmp_path, resume=True, TEACHER_BANK="off")


@pytest.mark.parametrize(("method", "device"), cases(["DTKD"], ("DTKD",)))
def test_the_kind_of_bank_may_change_when_a_run_goes_on(small, tmp_path, expected, method, device):
    opts = [*on(device, small), "DISTILLER.TYPE", method, "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    run(opts, tmp_path, TEACHER_BANK="lazy", SOLVER__EPOCHS=1)
    assert agree(outcome(run(opts, tmp_path, resume=True, TEACHER_BANK="full")), expected(method, device), device)


def test_a_full_disk_ends_the_growth_not_the_run(small, tmp_path, expected, monkeypatch, capsys):
    def full(self, rows, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RowStore, "add", full)
    opts = [*small, "DISTILLER.TYPE", "DTKD", "TEACHER_BANK", "lazy", "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    assert same(outcome(run(opts, tmp_path)), expected("DTKD"))
    assert capsys.readouterr().out.count("the teacher bank grows no further") == 1


def test_a_disk_without_room_is_found_before_anything_is_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    opts = [*small, "DISTILLER.TYPE", "DTKD", "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    with pytest.raises(UserError, match="disk space"):
        run(opts, tmp_path, TEACHER_BANK="full")
    assert not list(tmp_path.iterdir())


def test_logits_beyond_float16_are_named(small, tmp_path):
    file = save_teacher(tmp_path / "teacher", "resnet14")
    state = torch.load(file)["model"]
    state["fc.bias"][3] = 1e5
    torch.save({"model": state}, file)
    opts = [*small, "DISTILLER.TYPE", "KD", "DISTILLER.TEACHER_CKPT", str(file)]
    with pytest.raises(RunFailed, match="1e\\+05.*TEACHER_BANK_DTYPE float32"):
        run(opts, tmp_path)
    run(opts, tmp_path, TEACHER_BANK_DTYPE="float32")


@pytest.mark.parametrize(
    ("views", "draws", "held", "cuda", "mode"),
    [
        (162, 240, 0.0, False, "lazy"),
        (162, 240, 0.0, True, "full"),
        (162, 12, 0.0, False, "none"),
        (162, 12, 0.5, False, "lazy"),
        (162, 60, 0.0, True, "none"),
        (162, 60 * 5, 0.0, True, "full"),
        (162, 12, 1.0, True, "full"),
        (1, 2, 0.0, False, "lazy"),
        (1, 1, 0.0, False, "none"),
    ],
)
def test_auto_counts_the_teachers_passes(views, draws, held, cuda, mode):
    assert choose("auto", views, draws, held, cuda).mode == mode


def test_the_share_of_passes_that_is_said_is_that_of_a_run(small):
    """Against a simulation: draws of the plan, counted when they are new."""
    data, seen, passes = batches("crop", n=50), set(), 0
    for epoch in range(1, 61):
        fresh = set(data.row_numbers(data.plan(epoch)).tolist()) - seen
        passes += len(fresh)
        seen |= fresh
    said = choose("auto", 81, 60, 0.0, False).reason
    assert math.isclose(passes / (60 * 50), float(said.split(" leave ")[1].split(" %")[0]) / 100, abs_tol=0.03)


def test_memory_stays_that_of_the_pieces(small):
    """What is asked for together comes in parts of a fixed size."""
    data = batches(n=6)
    sizes = []
    model = lambda image: (sizes.append(len(image)), torch.zeros(len(image), 10))[1]  # noqa: E731
    TeacherLogits(data, model)(data.plan_of(torch.arange(6 * 162)))
    assert set(sizes) == {teacher.CHUNK["cpu"]}
