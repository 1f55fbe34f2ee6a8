"""When a run's checkpoints are written, under which names, and which of them a resumed run starts from."""

import os
import random
from types import SimpleNamespace

import pytest
import torch

from mdistiller.errors import UserError
from mdistiller.runs import checkpoint, keeper
from mdistiller.runs.folder import RunFolder
from mdistiller.runs.keeper import Keeper


@pytest.mark.parametrize("students", [1, 5])
@pytest.mark.parametrize(("every", "cost"), [(60, 0.1), (60, 30), (0.5, 0.1)])
def test_checkpoints_inside_an_epoch_are_apart_and_take_two_percent_of_the_time(
    tmp_path, monkeypatch, students, every, cost
):
    """The clock stands still but for steps, whose length varies, and writes. Several students share the promise."""
    clock, draw, apart = SimpleNamespace(now=0.0), random.Random(0), max(every, 50 * cost)
    monkeypatch.setattr(keeper, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def write(*_):
        clock.now += cost * draw.uniform(0.5, 1)

    monkeypatch.setattr(keeper.checkpoint, "save", write)
    kept, spent, ends = [Keeper(tmp_path, None, 40, every, students) for _ in range(students)], 0.0, {}
    while clock.now < 200 * apart:
        for number, own in enumerate(kept):
            clock.now += draw.uniform(0, apart / 50)
            if own.due():
                begin = clock.now
                waited = begin - ends.get(number, 0.0)
                assert waited > students * every
                assert waited < students * 1.1 * apart, "and no further apart than that"
                own.save({})
                spent, ends[number] = spent + clock.now - begin, clock.now
    assert 0 < spent < 0.021 * clock.now
    assert not Keeper(tmp_path, every_seconds=0).due()


def restored(folder, **origin) -> dict:
    state, path = Keeper(folder, origin).restore()
    return state | {"path": path.name}


def test_names_of_checkpoints(tmp_path):
    kept = Keeper(tmp_path, {"data": "d"}, every_epochs=2)
    for epoch, best in ((1, True), (2, False), (3, True)):
        kept.save_epoch(epoch, best, {"epoch": epoch}, {"student": epoch})
    kept.save({"epoch": 3.5})
    found = {path.name: checkpoint.load(path) for path in tmp_path.iterdir()}
    assert {name: state.get("epoch", state.get("student")) for name, state in found.items()} == {
        "latest": 3.5, "previous": 3, "best": 3, "epoch_2": 2, "student_latest": 3, "student_best": 3, "student_2": 2
    }  # fmt: skip
    assert found["latest"]["origin"] == {"data": "d"}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "gone", "junk"])
def test_a_damaged_latest_falls_back_to_the_one_before(tmp_path, capsys, damage):
    kept = Keeper(tmp_path, {"data": "d"})
    for value in (1.0, 2.0):
        kept.save({"weights": torch.full((999,), value)})
    latest, data = tmp_path / "latest", bytearray((tmp_path / "latest").read_bytes())
    data[len(data) // 2] ^= 1
    bad = {"truncated": data[:-1000], "flipped": data, "empty": b"", "junk": b"x" * 5000}.get(damage)
    latest.unlink()
    if bad is not None:
        latest.write_bytes(bad)
    state = restored(tmp_path, data="d")
    assert (state["path"], float(state["weights"].mean())) == ("previous", 1.0)
    assert "going on from the checkpoint before it" in capsys.readouterr().out
    assert restored(tmp_path, data="d")["path"] == "latest", "it has taken the other's place"
    assert (tmp_path / "latest.damaged").exists() == (bad is not None)
    for name in ("latest", "previous"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="latest"):
        restored(tmp_path, data="d")


def test_a_plugin_of_the_same_name_does_not_go_on_with_a_run(tmp_path, capsys):
    Keeper(tmp_path, {"data": "d", "plugins": "one"}).save({"epoch": 1})
    assert restored(tmp_path, data="d", plugins="one")["epoch"] == 1 and not capsys.readouterr().out
    restored(tmp_path, data="d", plugins="two")
    assert "the code of the plug-ins has changed" in capsys.readouterr().out
    with pytest.raises(UserError, match="began with a plug-in's method, model or data; name it in EXPERIMENT.PLUGINS"):
        restored(tmp_path, data="d", plugins="")
    Keeper(tmp_path, {"data": "d", "plugins": ""}).save({"epoch": 1})
    with pytest.raises(UserError, match="began without a plug-in's method, model or data; leave it out"):
        restored(tmp_path, data="d", plugins="one")
    Keeper(tmp_path, {"data": "d"}).save({"epoch": 1})  # of a version that did not look
    assert restored(tmp_path, data="d", plugins="one")


def test_auto_looks_again_when_it_holds_the_folder(tmp_path):
    def resumed(*names):
        for name in names:
            (tmp_path / "run" / name).write_text('{"epoch": 1}\n')
        folder = RunFolder(tmp_path / "run", resume="auto")
        folder.close()
        return folder.resumed

    assert not resumed()
    assert not resumed("metrics.jsonl"), "died before its first checkpoint"
    assert resumed("latest")
    assert os.listdir(tmp_path) == ["run"]
    RunFolder(tmp_path / "run").close()
    assert set(os.listdir(tmp_path)) == {"run", "run~1"}
