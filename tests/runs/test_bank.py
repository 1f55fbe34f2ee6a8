"""Runs with a bank of their teacher's logits, and without: the same bits, and never another teacher's."""

import pytest
from helpers import agree, cases, on, outcome, own_kd, run, same

from mdistiller.bank.inference import Inference
from mdistiller.bank.teacher import TeacherLogits
from mdistiller.engine import build
from mdistiller.errors import Preempted, RunFailed, UserError
from mdistiller.runs.stop import Stop


@pytest.mark.parametrize(("method", "device"), cases(["DTKD", "MLKD"], ("KD", "DTKD", "DKD")))
def test_a_bank_changes_no_bit(small, undisturbed, tmp_path, method, device):
    opts = [*on(device, small), "DISTILLER.TYPE", method, "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    cold = outcome(run(opts, tmp_path / "cold", TEACHER_BANK="lazy"))
    (bank,) = (tmp_path / "banks").iterdir()
    files = sorted(bank.iterdir())
    warm = outcome(run(opts, tmp_path / "warm", TEACHER_BANK="lazy"))
    expected = outcome(undisturbed(method, device))
    assert agree(cold, expected, device)
    assert agree(warm, expected, device)
    assert sorted(bank.iterdir()) == files, "the second run met the views of the first"


@pytest.mark.parametrize(("method", "device"), cases(["DTKD"], ("DTKD",)))
def test_a_full_bank_changes_no_bit_and_needs_no_teacher(small, undisturbed, tmp_path, monkeypatch, method, device):
    opts = [*on(device, small), "DISTILLER.TYPE", method, "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    expected = outcome(undisturbed(method, device))
    folder = run(opts, tmp_path / "cold", TEACHER_BANK="lazy", SOLVER__EPOCHS=1)
    whole = run(opts, tmp_path / "cold", resume=True, TEACHER_BANK="full")
    assert whole == folder and agree(outcome(whole), expected, device), "the kind of bank may change"
    monkeypatch.setattr(TeacherLogits, "compare", lambda self: None)  # some rows, which tell that it is this teacher's
    monkeypatch.setattr(TeacherLogits, "run_teacher", None)
    assert agree(outcome(run(opts, tmp_path / "warm", TEACHER_BANK="full")), expected, device)
    run(opts, tmp_path / "other seed", TEACHER_BANK="full", SEED=7, SOLVER__EPOCHS=1)


def test_an_interrupted_precomputation_goes_on(small, undisturbed, tmp_path, monkeypatch):
    opts = [*small, "DISTILLER.TYPE", "DTKD", "TEACHER_BANK", "full", "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    expected = outcome(undisturbed("DTKD"))  # first: a run that is made for it asks the teacher too
    passes, real = [], TeacherLogits.run_teacher

    def counted(self, rows, check=lambda: None):
        for part in real(self, rows, check):
            passes.append(len(part))
            yield part

    class StopsAfterFive(Stop):
        def check(self):
            self.signal = "SIGTERM" if len(passes) == 5 else self.signal
            super().check()

    monkeypatch.setattr(TeacherLogits, "run_teacher", counted)
    monkeypatch.setattr(TeacherLogits, "compare", lambda self: None)  # which asks the teacher too
    monkeypatch.setattr(build, "Stop", StopsAfterFive)
    with pytest.raises(Preempted, match="SIGTERM"):
        run(opts, tmp_path)
    assert len(passes) == 5
    monkeypatch.setattr(build, "Stop", Stop)
    assert same(outcome(run(opts, tmp_path, resume="auto")), expected)
    assert sum(passes) == 40 * 25, "no view came twice"


def test_a_run_that_is_stopped_keeps_what_it_has_asked(small, undisturbed, tmp_path, interrupted):
    opts = [*small, "DISTILLER.TYPE", "DTKD", "TEACHER_BANK", "lazy", "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    expected = outcome(undisturbed("DTKD"))
    kept = []

    def train(resume):
        kept.append(len(list((tmp_path / "banks").glob("*/*.safetensors"))))
        return run(opts, tmp_path, resume)

    assert same(outcome(interrupted(train, 1)), expected) and kept == [0, 1]


def test_a_teacher_whose_code_has_changed_is_noticed_before_anything_is_written(small, tmp_path, monkeypatch):
    opts = [*small, "DISTILLER.TYPE", "KD", "SOLVER.EPOCHS", "1", "TEACHER_BANK_FOLDER", str(tmp_path / "banks")]
    run(opts, tmp_path / "run", TEACHER_BANK="lazy")
    real = Inference.__call__
    monkeypatch.setattr(Inference, "__call__", lambda self, image: 1.1 * real(self, image))
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(UserError, match="other logits than this teacher gives"):
        run(opts, tmp_path / "run", TEACHER_BANK="lazy")
    assert sorted((tmp_path / "run").rglob("*")) == before
    folder = run(opts, tmp_path / "auto")
    assert "teacher bank: none" in (folder / "worklog.txt").read_text()


@pytest.mark.parametrize("method", ["NONE", "FITNET"])
def test_other_methods_run_their_teacher_as_ever(small, tmp_path, method):
    bank = {"TEACHER_BANK": "full", "TEACHER_BANK_FOLDER": tmp_path / "banks"}
    folder = run([*small, "DISTILLER.TYPE", method], tmp_path, SOLVER__EPOCHS=1, **bank)
    assert not (tmp_path / "banks").exists()
    said = f"teacher bank: none ({method} needs more of its teacher than logits)"
    assert (said in (folder / "worklog.txt").read_text()) == (method != "NONE")


BODIES = {
    "asks": "    def forward_train(self, image, target, **kwargs):\n"
    "        v, _ = self.student(image)\n        with torch.no_grad():\n            u, _ = self.teacher(image)\n"
    "        return v, {'kd': kd_loss(v, u, 4.0)}\n",
    "learns": "    def get_learnable_parameters(self):\n"
    "        return [*super().get_learnable_parameters(), *self.teacher.parameters()]\n",
    "trains": "    def train(self, mode=True):\n        super().train(mode)\n        self.teacher.train(mode)\n"
    "        return self\n",
    "moves": "    def losses(self, *args, **kwargs):\n        with torch.no_grad():\n"
    "            self.teacher.fc.bias += 1\n        return super().losses(*args, **kwargs)\n",
}


@pytest.mark.parametrize("how", BODIES)
def test_a_plugin_whose_teacher_changes_or_is_asked_by_itself(small, tmp_path, how):
    words = own_kd(tmp_path / f"{how}.py", f"BANK_{how.upper()}", BODIES[how])
    opts = [*small, *words, "SOLVER.EPOCHS", "1"]
    if how == "moves":
        with pytest.raises(RunFailed, match="set TEACHER_BANK off"):
            run(opts, tmp_path)
        run(opts, tmp_path, TEACHER_BANK="off")
    else:
        folder = run(opts, tmp_path, TEACHER_BANK="lazy", TEACHER_BANK_FOLDER=tmp_path / "banks")
        assert not (tmp_path / "banks").exists()
        assert "needs more of its teacher" in (folder / "worklog.txt").read_text()
