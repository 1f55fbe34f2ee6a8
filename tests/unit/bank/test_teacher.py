"""A teacher's logits on a batch, with a bank and without: the same numbers, however the bank came to be."""

import contextlib
import errno

import pytest
import torch
from helpers import CPU
from methods import model

from mdistiller.bank import segments, teacher
from mdistiller.bank.inference import Inference
from mdistiller.bank.segments import Segments
from mdistiller.bank.teacher import Bank, TeacherLogits
from mdistiller.dataset import Batches
from mdistiller.device import has_bf16
from mdistiller.errors import RunFailed

PRECISIONS = ["none", "bf16"] if has_bf16(CPU) else ["none"]


def batches(augment="crop", n=6):
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batches(images, torch.arange(n), (0.5,) * 3, (0.25,) * 3, 4, augment)


def inference(amp="none"):
    return Inference(model().eval(), CPU, amp)


def logits_of(folder=None, dtype=torch.float16, fast=None, data=None):
    """A teacher's logits on 6 images; with the bank in `folder`."""
    data = data or batches()
    bank = folder and Bank(Segments(folder, {"teacher": "resnet8"}, data.num_samples * data.views, 10, dtype))
    return TeacherLogits(data, fast or inference(), dtype, bank)


def files(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("augment", "views"), [("crop_flip", 162), ("crop", 81), ("none", 1)])
def test_every_view_has_its_number(augment, views):
    data = batches(augment)
    assert data.views == views
    numbers = torch.arange(6 * views)
    assert torch.equal(data.row_numbers(data.plan_of(numbers)), numbers)
    plan = data.plan(3)
    assert torch.equal(data.plan_of(data.row_numbers(plan)), plan)
    assert data.row_numbers(plan).max() < 6 * views


@pytest.mark.parametrize("amp", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_bank_changes_no_number(tmp_path, dtype, amp):
    """Nor does it say other numbers than the teacher's, but for their rounding."""
    fast, data = inference(amp=amp), batches()
    plan = data.plan(1)
    expected = logits_of(None, dtype, fast)(plan)
    lazy = logits_of(tmp_path / "lazy", dtype, fast)
    lazy(data.plan(2)[:, :4])
    assert torch.equal(lazy(plan), expected), "some views are held, or none"
    lazy.bank.commit()
    warm = logits_of(tmp_path / "lazy", dtype, fast)
    assert warm.bank.rows.holds(data.row_numbers(plan)).all()
    assert torch.equal(warm(plan), expected)
    full = logits_of(tmp_path / "full", dtype, fast)
    full.bank.fill_first = True
    full.prepare(lambda: None)
    assert full.complete and torch.equal(full(plan), expected)
    own = fast(data.batch(plan).image)
    assert expected.dtype == torch.float32
    assert (expected - own).abs().max() <= (0 if dtype == torch.float32 and amp == "none" else 1e-2) * own.abs().max()


def test_passes_have_one_size(monkeypatch):
    monkeypatch.setitem(teacher.CHUNK, "cpu", 8)
    sizes = []
    model = lambda image: (sizes.append(len(image)), torch.zeros(len(image), 10))[1]  # noqa: E731
    logits = logits_of(fast=model)
    logits(logits.batches.plan_of(torch.arange(19)))
    assert sizes == [8, 8, 8]


def test_logits_beyond_float16_are_named():
    fast = lambda image: torch.full((len(image), 10), 1e5)  # noqa: E731
    plan = batches().plan(1)
    with pytest.raises(RunFailed, match=r"1e\+05.*TEACHER_BANK_DTYPE float32"):
        logits_of(fast=fast)(plan)
    assert (logits_of(None, torch.float32, fast)(plan) == 1e5).all()


def full_disk(*given):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_growth_and_not_the_run(tmp_path, monkeypatch, capsys):
    logits, expected = logits_of(tmp_path), logits_of()
    plans = [logits.batches.plan(epoch) for epoch in (1, 2, 3)]
    monkeypatch.setattr(segments, "write_atomic", full_disk)
    for plan in plans:
        assert torch.equal(logits(plan), expected(plan))
        logits.bank.commit()
    assert capsys.readouterr().out.count(f"warning: {tmp_path}: No space left on device; the teacher bank grows") == 1


def test_a_full_disk_ends_what_has_to_be_full(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "write_atomic", full_disk)
    logits = logits_of(tmp_path / "bank")
    with pytest.raises(RunFailed, match="bank: No space left on device; what it holds stays; make room, or"):
        logits.fill(lambda: None)
    logits.bank.commit()


def test_files_come_at_intervals(tmp_path, monkeypatch, capsys):
    logits = logits_of(tmp_path)
    for epoch in range(3):
        logits(logits.batches.plan(epoch))
        logits.commit()
    assert files(tmp_path) == []
    monkeypatch.setattr(teacher, "COMMIT_EVERY_S", 0.0)
    logits.commit()
    assert len(files(tmp_path)) == 1
    logits.fill(lambda: None)
    said = capsys.readouterr().out
    assert " % done, 00:0" in said and "complete after 00:0" in said


def test_a_bank_is_compared_on_the_stream_that_all_use(tmp_path, monkeypatch):
    """Elsewhere it would read the input of the teacher's graph while another student's pass writes it."""
    logits, entered, inside = logits_of(tmp_path), [], []

    @contextlib.contextmanager
    def stream(given):
        entered.append(given)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    for name in ("compare", "fill"):
        monkeypatch.setattr(logits, name, lambda *given, name=name: inside.append((name, *entered)))
    logits.stream, logits.bank.fill_first = "shared", True
    logits.prepare(lambda: None)
    assert inside == [("compare", "shared"), ("fill", "shared")]
