import numpy as np
import pytest
import torch

from mdistiller.distillers.DTKD import max_logit
from mdistiller.errors import UserError
from mdistiller.runs.temperature import FIELDS, HEADER, SAVED, EpochBuffer, RecordFile, correlation, read_record

CPU = torch.device("cpu")


def epoch(seed, n=20, seen=20):
    generator = torch.Generator().manual_seed(seed)
    v, u = (3 * torch.randn(n, 5, generator=generator) for _ in range(2))
    buffer = EpochBuffer(n, CPU)
    for index in torch.randperm(n, generator=generator)[:seen].split(6):
        buffer.put(index, v[index], u[index], max_logit(v[index], u[index], 4.0))
    return v, u, buffer


def test_every_sample_is_written_in_its_place(tmp_path):
    file = RecordFile(tmp_path / "t.bin", 20)
    epochs = [epoch(seed) for seed in range(3)]
    for number, (_, _, buffer) in enumerate(epochs, 1):
        file.append(buffer)
        assert len(read_record(tmp_path / "t.bin").values) == number  # readable while it grows
    fields, values = read_record(tmp_path / "t.bin")
    assert fields == SAVED
    for (v, u, _), block in zip(epochs, values, strict=True):
        t = max_logit(v, u, 4.0)
        expected = torch.stack([t.student[:, 0], t.teacher[:, 0], v.amax(1), u.amax(1)])
        np.testing.assert_allclose(block, expected, rtol=1e-3)


def test_a_crash_costs_only_the_unfinished_epochs(tmp_path):
    path = tmp_path / "t.bin"
    file = RecordFile(path, 20)
    for seed in range(3):
        file.append(epoch(seed)[2])
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert len(read_record(path).values) == 2
    RecordFile(path, 20, done=1).append(epoch(1)[2])
    assert path.read_bytes() == whole[: HEADER + 2 * 160]
    late = RecordFile(path, 20, done=5)
    assert late.missing == 3
    values = read_record(path).values
    assert [bool(np.isnan(block).all()) for block in values] == [False, False, True, True, True]


def test_summary():
    v, u, buffer = epoch(0, seen=15)
    seen = ~buffer.values[0].isnan()
    assert seen.sum() == 15
    t = max_logit(v, u, 4.0)
    summary = buffer.summary()
    np.testing.assert_allclose(summary["t_student"]["mean"], t.student[seen].mean(), rtol=1e-5)
    np.testing.assert_allclose(summary["t_teacher"]["q25"], np.quantile(t.teacher[seen], 0.25), rtol=1e-5)
    sharpness = torch.logsumexp(u / t.teacher, 1)[seen]
    np.testing.assert_allclose(summary["sharpness_teacher"]["max"], sharpness.max(), rtol=1e-5)
    assert summary["fell_back"] == pytest.approx(1 - t.sound[seen].double().mean().item())
    confidence = u.softmax(1).amax(1)[seen].numpy()
    expected = np.corrcoef(t.student[seen, 0].numpy(), confidence)[0, 1]
    assert summary["confidence_correlation_t_student"] == pytest.approx(expected, rel=1e-4)
    assert EpochBuffer(4, CPU).summary() == {}


def test_a_constant_temperature_correlates_with_nothing():
    assert correlation(np.full(9, 4.0), np.arange(9.0)) == 0


def test_a_whole_run_stays_small():
    assert HEADER + 240 * 50_000 * 2 * len(SAVED) < 200e6
    assert FIELDS[: len(SAVED)] == SAVED


@pytest.mark.parametrize("content", [b"", b"{}", b"junk" * 2000, b'{"format": 2, "samples": 3, "fields": []}'])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "t.bin").write_bytes(content)
    with pytest.raises(UserError, match="is no temperature record"):
        read_record(tmp_path / "t.bin")
    with pytest.raises(UserError, match="cannot be read"):
        read_record(tmp_path / "gone.bin")
