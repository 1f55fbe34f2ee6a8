"""mdistiller's trainers: a run where nothing is overridden, else what a subclass overrides is called."""

import pytest
import torch
from helpers import CPU, outcome, same, small_run
from torch.utils.data import DataLoader

from mdistiller import config
from mdistiller.dataset import get_dataset, load_dataset
from mdistiller.device import seed_everything
from mdistiller.engine import trainer_dict
from mdistiller.engine.base_trainer import METERS
from mdistiller.engine.method import build_distiller
from mdistiller.engine.run import train
from mdistiller.engine.trainer import DOT, BaseTrainer, CRDTrainer
from mdistiller.engine.utils import AverageMeter, accuracy, adjust_learning_rate, save_checkpoint, validate
from mdistiller.errors import UserError
from mdistiller.runs.recorder import read_metrics


@pytest.fixture
def make(tmp_path):
    """make(class, KEY=value ...) -> its trainer on `small_run`, in the folder tmp_path/lab/run."""
    words = small_run(tmp_path)

    def build(cls=BaseTrainer, loader=None, **changes):
        changes = {"LOG.PREFIX": tmp_path, "DISTILLER.TYPE": "KD", "TEACHER_BANK": "off", "SOLVER.LR": 0.01} | {
            key.replace("__", "."): value for key, value in changes.items()
        }
        cfg = config.load(None, [*words, *(str(word) for pair in changes.items() for word in pair)])
        seed_everything(cfg.SEED)
        data = load_dataset(cfg.DATASET.TYPE, cfg.DATASET.ROOT)
        distiller = build_distiller(cfg, data, tmp_path / "teacher", CPU)
        train_loader, val_loader, _, _ = get_dataset(cfg)
        return cls("lab/run", distiller, train_loader if loader is None else loader(train_loader), val_loader, cfg)

    return build


class Own(BaseTrainer):
    """A step as method authors write it."""

    def train_iter(self, data, epoch, train_meters):
        image, target, index = data
        self.optimizer.zero_grad()
        logits, terms = self.distiller(image=image, target=target, index=index, epoch=epoch)
        loss = sum(term.mean() for term in terms.values())
        loss.backward()
        self.optimizer.step()
        top1, _ = accuracy(logits, target, topk=(1, 5))
        train_meters["losses"].update(loss.item(), len(target))
        train_meters["top1"].update(top1[0].item(), len(target))
        return f"epoch {epoch}"


class OwnDOT(DOT):
    """DOT's two calls, as method authors write them."""

    def train_iter(self, data, epoch, train_meters):
        image, target, index = data
        _, terms = self.distiller(image=image, target=target, index=index, epoch=epoch)
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss_kd"].mean().backward(retain_graph=True)
        self.optimizer.step_kd()
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss_ce"].mean().backward()
        self.optimizer.step()
        train_meters["losses"].update(sum(term.item() for term in terms.values()), len(target))
        return ""


class Passes:
    """A loader of nobody's: the epochs of another one, from the first on."""

    def __init__(self, loader):
        self.loader, self.dataset = loader, loader.dataset
        loader.set_epoch(1)

    def __iter__(self):
        return iter(self.loader)


def test_names():
    assert trainer_dict["base"] is BaseTrainer and trainer_dict["dot"] is DOT and trainer_dict["crd"] is CRDTrainer
    assert issubclass(trainer_dict["crd_dot"], DOT)


@pytest.mark.parametrize(("cls", "name", "own"), [(BaseTrainer, "base", Own), (DOT, "dot", OwnDOT)])
def test_nothing_overridden_is_a_run_and_the_plain_loop_comes_to_the_same(make, tmp_path, cls, name, own):
    """The plain loop: with batches that somebody else gives, or a step that a subclass writes."""
    folder, trainer = tmp_path / "lab" / "run", make(cls)
    result = trainer.train()
    assert trainer.log_path == str(folder)
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.SOLVER.TRAINER, cfg.LOG.PREFIX = name, str(tmp_path / "other")
    run = train(cfg)
    (state, rows), (expected, others) = outcome(folder), outcome(tmp_path / "other" / "distill" / "run")
    assert same(state["model"], expected["model"]) and rows == others
    assert result["best_acc"] == run["best_acc"] == trainer.best_acc

    rows, weights = read_metrics(folder), torch.load(folder / "student_latest")["model"]
    for number, kind in enumerate((cls, own), 1):
        make(kind, loader=Passes if kind is cls else None).train()
        assert (tmp_path / "lab" / f"run~{number}").exists(), "the earlier run is kept"
        files = {path.name for path in folder.iterdir()}
        assert files >= {
            "latest", "best", "student_latest", "student_best", "worklog.txt", "config.yaml", "metrics.jsonl"
        }  # fmt: skip
        skipped = {"train_acc"} if kind is OwnDOT else set()  # which it does not count
        if kind is own:
            assert f"{own.__name__} brings train_iter: a plain loop" in (folder / "worklog.txt").read_text()
        torch.testing.assert_close(torch.load(folder / "student_latest")["model"], weights, rtol=1e-4, atol=1e-5)
        figures = {"lr", "train_loss", "train_acc", "test_acc", "test_acc_top5", "test_loss", "best_acc"} - skipped
        for row, known in zip(read_metrics(folder), rows, strict=True):
            assert {key: row[key] for key in figures} == pytest.approx({key: known[key] for key in figures}, rel=1e-4)


def test_the_plain_loop_goes_on_where_it_stopped(make, tmp_path):
    folder = tmp_path / "lab" / "run"
    make(Own, DISTILLER__TYPE="MLKD").train()
    whole = outcome(folder)

    class Stops(Own):
        def log(self, lr, epoch, log_dict):
            super().log(lr, epoch, log_dict)
            if epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(Stops, DISTILLER__TYPE="MLKD").train()
    make(Own, DISTILLER__TYPE="MLKD").train(resume=True)
    assert same(outcome(folder), whole)
    with pytest.raises(UserError, match="SOLVER.LR is 0.5"):
        make(Own, DISTILLER__TYPE="MLKD", SOLVER__LR=0.5).train(resume=True)
    with pytest.raises(UserError, match="no run in"):
        make(Own, LOG__PREFIX=tmp_path / "nowhere").train(resume=True)


def test_train_epoch_of_a_subclass(make, tmp_path):
    seen = []

    class Epochs(BaseTrainer):
        def train_epoch(self, epoch):
            rate = adjust_learning_rate(epoch, self.cfg, self.optimizer)
            meters = {name: AverageMeter() for name in METERS}
            self.distiller.train()
            for data in self.train_loader:
                assert isinstance(self.train_iter(data, epoch, meters), str)
            top1, top5, loss = validate(self.val_loader, self.distiller)
            figures = {
                "train_acc": 0.0,
                "train_loss": meters["losses"].avg,
                "test_acc": top1,
                "test_acc_top5": top5,
                "test_loss": loss,
            }
            self.log(rate, epoch, figures | {"extra": 3.0})
            save_checkpoint({"model": self.distiller.module.student.state_dict()}, f"{self.log_path}/mine_{epoch}")
            self.tf_writer.add_scalar("mine", 1.0, epoch)
            seen.append(epoch)

    result = make(Epochs).train()
    rows = read_metrics(tmp_path / "lab" / "run")
    assert seen == [1, 2] and [row["extra"] for row in rows] == [3.0, 3.0]
    assert result["last_acc"] == rows[-1]["test_acc"] and (tmp_path / "lab" / "run" / "mine_2").exists()
    seen.clear()
    make(Epochs, SOLVER__EPOCHS=3).train(resume=True)
    assert seen == [3]


def test_an_epoch_that_is_built_on_and_an_optimizer_of_ones_own(make, tmp_path):
    class More(BaseTrainer):
        before = 0

        def init_optimizer(self, cfg):
            return torch.optim.Adam(self.distiller.module.get_learnable_parameters(), lr=cfg.SOLVER.LR)

        def train_epoch(self, epoch):
            self.before += 1
            super().train_epoch(epoch)

    assert make().optimizer.param_groups[0]["lr"] == make(DOT).optimizer.param_groups[0]["lr"] == 0.01
    trainer = make(More, SOLVER__LR=0.001)
    trainer.train()
    assert trainer.before == 2 and isinstance(trainer.step.optimizer, torch.optim.Adam)
    first, second = read_metrics(tmp_path / "lab" / "run")
    assert second["train_loss"] < first["train_loss"]


def test_the_plain_loop_follows_the_keys_of_the_optimizer_and_refuses_those_that_it_does_not_read(make, tmp_path):
    trainer = make(loader=Passes, SOLVER__TYPE="AdamW", SOLVER__SCHEDULE="cosine")
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    trainer.train()
    assert [row["lr"] for row in read_metrics(tmp_path / "lab" / "run")] == pytest.approx([0.01, 0.005])
    with pytest.raises(UserError, match="does not read SOLVER.CLIP 1.0, SOLVER.EMA 0.9; leave them out"):
        make(Own, SOLVER__CLIP=1.0, SOLVER__EMA=0.9).train()


def test_contrastive_indices_reach_the_method(make):
    trainer = make(CRDTrainer, DISTILLER__TYPE="CRD", SOLVER__TRAINER="crd", SOLVER__EPOCHS=1)
    method, given = trainer.distiller.module, []
    method.draw = lambda *_: pytest.fail("the loader has drawn them")
    before = method.feature_loss
    method.feature_loss = lambda *a, **k: given.append(k["contrastive_index"]) or before(*a, **k)
    trainer.train()
    trainer.train_loader.set_epoch(1)
    assert len(given) == 3 and all(map(torch.equal, given, (data[3] for data in trainer.train_loader)))


def test_batches_of_another_shape_are_refused(make):
    pairs = make(loader=lambda loader: DataLoader([(torch.zeros(3, 32, 32), 1)] * 4, 2))
    with pytest.raises(UserError, match="train_iter: takes"):
        pairs.train()


def test_train_of_a_subclass(make, tmp_path):
    class Patient(BaseTrainer):
        def train(self, resume=False):
            for epoch in (1, 2):
                self.train_epoch(epoch)

    Patient.train(make(Patient))
    first = outcome(tmp_path / "lab" / "run")
    make(loader=Passes).train()
    assert same(first[0]["model"], outcome(tmp_path / "lab" / "run")[0]["model"])
    assert [row["test_acc"] for row in first[1]] == [row["test_acc"] for row in read_metrics(tmp_path / "lab" / "run")]
