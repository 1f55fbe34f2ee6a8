"""The contract of a method: golden figures, the teacher's rest, plug-ins."""

import textwrap

import pytest
import reference
import torch

from mdistiller.config import load
from mdistiller.distillers import Distiller, Vanilla, distiller_dict
from mdistiller.distillers.features import ConvReg, get_feat_shapes
from mdistiller.engine.build import prepare_parts
from mdistiller.engine.cfg import CFG
from mdistiller.errors import ConfigError
from mdistiller.models import cifar_model_dict

GOLDEN = reference.golden()
LOGIT = ("KD", "DTKD")


def build(name, teacher="resnet14", student="resnet8", classes=100):
    torch.manual_seed(0)
    models = [cifar_model_dict[m][0](num_classes=classes) for m in (student, teacher)]
    return distiller_dict[name](models[0]) if name == "NONE" else distiller_dict[name](*models, CFG)


@pytest.mark.parametrize("name", LOGIT)
def test_stored_teacher_logits_stand_for_the_teacher(name):
    distiller = build(name).train()
    image, target = reference.images(), reference.labels()
    with torch.no_grad():
        stored, _ = distiller.teacher(image)
    runs = []
    distiller.teacher.register_forward_hook(lambda *_: runs.append(1))
    losses = [
        distiller(image=image, target=target, epoch=3, index=None, **extra)[1]
        for extra in ({}, {"logits_teacher": stored})
    ]
    assert torch.equal(losses[0]["loss_kd"], losses[1]["loss_kd"])
    assert len(runs) == 1


def test_probing_shapes_leaves_no_trace():
    student, teacher = (cifar_model_dict[name][0](num_classes=5).train() for name in ("resnet8", "wrn_16_2"))
    student.conv1.eval()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    noise = torch.get_rng_state()
    s, t = get_feat_shapes(student, teacher, (32, 32))
    assert [tuple(x) for x in s] == [(1, 16, 32, 32), (1, 16, 32, 32), (1, 32, 16, 16), (1, 64, 8, 8)]
    assert [x[1] for x in t] == teacher.get_stage_channels()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert torch.equal(noise, torch.get_rng_state())
    assert teacher.training
    assert not student.conv1.training


@pytest.mark.parametrize(("s", "t"), [((8, 16, 16), (4, 8, 8)), ((8, 4, 4), (6, 8, 8)), ((8, 8, 8), (3, 6, 6))])
def test_regressor_reaches_the_teachers_shape(s, t):
    assert ConvReg((1, *s), (1, *t))(torch.randn(2, *s)).shape == (2, *t)


def test_regressor_refuses_what_it_cannot_reach():
    with pytest.raises(NotImplementedError, match="4 x 4"):
        ConvReg((1, 8, 4, 4), (1, 8, 16, 16))


# A method file as users of mdistiller have them: relative imports, cfg.X, an entry added to the dict by hand.
FOREIGN = """
import torch
import torch.nn as nn
import torch.nn.functional as F
from ._base import Distiller
from ._common import ConvReg, get_feat_shapes
from .KD import kd_loss
from mdistiller.distillers import distiller_dict


class Hybrid(Distiller):
    def __init__(self, student, teacher, cfg):
        super(Hybrid, self).__init__(student, teacher)
        self.weight = cfg.HYBRID.WEIGHT
        self.temperature = cfg.HYBRID.T
        shapes_s, shapes_t = get_feat_shapes(self.student, self.teacher, cfg.HYBRID.INPUT_SIZE)
        self.regressor = ConvReg(shapes_s[2], shapes_t[2])

    def get_learnable_parameters(self):
        return super().get_learnable_parameters() + list(self.regressor.parameters())

    def forward_train(self, image, target, **kwargs):
        logits_student, feature_student = self.student(image)
        with torch.no_grad():
            logits_teacher, feature_teacher = self.teacher(image)
        hint = F.mse_loss(self.regressor(feature_student["feats"][2]), feature_teacher["feats"][2])
        return logits_student, {
            "loss_ce": F.cross_entropy(logits_student, target),
            "loss_kd": self.weight * (hint + kd_loss(logits_student, logits_teacher, self.temperature)),
        }


distiller_dict["HYBRID"] = Hybrid
"""


def test_a_foreign_file_runs_unchanged(tmp_path):
    plugin = tmp_path / "Hybrid.py"
    plugin.write_text(FOREIGN)
    path = tmp_path / "x.yaml"
    path.write_text(
        f"EXPERIMENT: {{PLUGINS: [{plugin}]}}\nDISTILLER: {{TYPE: HYBRID, TEACHER: resnet14, STUDENT: resnet8}}\n"
        "HYBRID: {WEIGHT: 5e-1, T: 4, INPUT_SIZE: [32, 32]}\n"
    )
    for _ in range(2):  # the same file may be loaded again
        cfg = load(path)
    assert (cfg.HYBRID.WEIGHT, cfg.HYBRID.INPUT_SIZE) == (0.5, [32, 32])
    student, teacher = (cifar_model_dict[m][0](num_classes=100) for m in ("resnet8", "resnet14"))
    distiller = prepare_parts(distiller_dict["HYBRID"](student, teacher, cfg), torch.device("cpu")).train()
    with torch.autocast("cpu", torch.bfloat16):
        _, losses = distiller(image=reference.images(), target=reference.labels(), epoch=1, index=None)
    assert all(value.dtype == torch.float32 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in distiller.get_learnable_parameters())


def test_pairs_reach_a_section_that_a_foreign_file_reads(tmp_path):
    (tmp_path / "reader.py").write_text("def build(cfg):\n    return cfg.READER.LOSS.WEIGHT, cfg.READER.SIZE\n")
    pairs = ["READER.LOSS.WEIGHT", "2.5", "READER.SIZE", "(32,32)", "READER.LOSS.MORE", "1"]
    cfg = load(None, ["EXPERIMENT.PLUGINS", str(tmp_path / "reader.py"), *pairs])
    assert (cfg.READER.LOSS.WEIGHT, cfg.READER.SIZE, cfg.READER.LOSS.MORE) == (2.5, (32, 32), 1)


def test_a_plugin_declares_its_own_section(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        textwrap.dedent("""
        '''Mine, a test.'''
        from mdistiller.distillers import register_distiller
        from mdistiller.distillers.KD import KD

        @register_distiller("MINE_OWN", defaults={"T": 2.0, "LOSS": {"WEIGHT": 1.0}})
        class Mine(KD):
            pass
        """)
    )
    cfg = load(None, ["EXPERIMENT.PLUGINS", str(plugin), "DISTILLER.TYPE", "MINE_OWN", "MINE_OWN.LOSS.WEIGHT", "3"])
    assert (cfg.MINE_OWN.T, cfg.MINE_OWN.LOSS.WEIGHT) == (2.0, 3.0)
    with pytest.raises(ConfigError, match="did you mean MINE_OWN.LOSS.WEIGHT"):
        load(None, ["EXPERIMENT.PLUGINS", str(plugin), "MINE_OWN.LOSS.WEIHGT", "3"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("def", "SyntaxError"),
        ("from mdistiller.distillers import distiller_dict as d\nd['KD'] = 1", "KD"),
    ],
)
def test_a_plugin_that_fails_is_one_line(tmp_path, text, says):
    plugin = tmp_path / "bad.py"
    plugin.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load(None, ["EXPERIMENT.PLUGINS", f"['{plugin}']"])
    assert len(caught.value.lines) == 1


def test_vanilla_is_the_student_alone():
    assert distiller_dict["NONE"] is Vanilla
    assert issubclass(Vanilla, Distiller)
    _, losses = build("NONE").train()(image=reference.images(), target=reference.labels(), index=None, epoch=1)
    assert list(losses) == ["ce"]
