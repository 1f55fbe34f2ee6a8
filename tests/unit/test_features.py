"""What feature methods share."""

import pytest
import torch
from helpers import refused
from methods import model
from torch import nn

from mdistiller.distillers.features import ConvReg, get_feat_shapes, pooled_width, unit
from mdistiller.errors import UserError
from mdistiller.models import check_parts, given_parts


def test_probing_leaves_no_trace():
    student, teacher = model("resnet8", 5).train(), model("wrn_16_2", 5).train()
    student.conv1.eval()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    noise = torch.get_rng_state()
    s, t = get_feat_shapes(student, teacher, (32, 32))
    assert given_parts(teacher, "x", 5, 32) >= {"feats", "preact_feats", "pooled_feat", "get_stage_channels"}
    assert [tuple(x) for x in s] == [(1, 16, 32, 32), (1, 16, 32, 32), (1, 32, 16, 16), (1, 64, 8, 8)]
    assert [x[1] for x in t] == teacher.get_stage_channels()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert torch.equal(noise, torch.get_rng_state())
    assert pooled_width(model("MobileNetV2")) == 1280
    assert teacher.training and student.bn1.training and not student.conv1.training


def test_the_regressor_reaches_the_teachers_shape_or_refuses():
    for s, t in (((8, 16, 16), (4, 8, 8)), ((8, 4, 4), (6, 8, 8)), ((8, 8, 8), (3, 6, 6))):
        assert ConvReg((1, *s), (1, *t))(torch.randn(2, *s)).shape == (2, *t)
    with pytest.raises(NotImplementedError, match="4 x 4"):
        ConvReg((1, 8, 4, 4), (1, 8, 16, 16))


def test_unit_leaves_zero_alone():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    y = unit(x, 1)
    torch.testing.assert_close(y, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    y.sum().backward()
    assert x.grad.abs().max() <= 1


class Net(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.dropout, self.output = nn.Dropout(), output

    def forward(self, x):
        return self.output(self.dropout(x).mean((2, 3)))


def test_what_a_network_gives_is_found_out_by_one_image():
    assert given_parts(Net(lambda x: x), "net", 3, 8) == set()
    assert given_parts(Net(lambda x: (x, {"feats": [x]})), "net", 3, 8) == {"feats"}
    for output, says in (
        (lambda x: x[:, :2], r"must give logits \(1, 3\) for one image; it gives shape \(1, 2\)"),
        (lambda x: [x], "it gives list"),
        (lambda x: x.view(7), r"the model net fails on an image of shape \(1, 3, 8, 8\): shape '\[7\]' is invalid"),
    ):
        net = Net(output).train()
        with pytest.raises(UserError, match=says):
            given_parts(net, "net", 3, 8)
        assert net.training and net.dropout.training


class Given(nn.Module):
    """Returns logits of three classes and these features."""

    def __init__(self, channels=(4, 4), **feats):
        super().__init__()
        self.feats, self.channels = feats, channels

    def forward(self, x):
        return x.mean((2, 3)), self.feats

    def get_stage_channels(self):
        return self.channels


MAP, TOKENS = torch.zeros(1, 4, 2, 2), torch.zeros(1, 17, 4)


@pytest.mark.parametrize(
    ("given", "needed", "says"),
    [
        ({"pooled_feat": MAP}, "pooled_feat", r"'pooled_feat' must be features \(B, C\);.* it gives \(1, 4, 2, 2\)"),
        ({"pooled_feat": None}, "pooled_feat", "it gives NoneType"),
        ({"feats": [TOKENS] * 5}, "feats", r"list of 2 or more maps \(B, C, H, W\).*\[\(1, 17, 4\), .*, \.\.\.\]"),
        ({"feats": [MAP]}, "feats", r"list of 2 or more maps \(B, C, H, W\), the stem's first; .* \[\(1, 4, 2, 2\)\]"),
        ({"feats": torch.stack([MAP, MAP])}, "feats", r"it gives \(2, 1, 4, 2, 2\)"),
        ({"preact_feats": [MAP] * 2, "channels": [4, 8]}, "preact_feats", r"must give \[4, 4\], .* it gives \[4, 8\]"),
        ({"preact_feats": [MAP] * 2, "channels": "44"}, "preact_feats", "it gives '44'"),
    ],
)
def test_features_of_another_form_are_refused(given, needed, says):
    with refused(says):
        check_parts(Given(**given), "net", 8, (needed, "get_stage_channels"), 2)


def test_features_of_the_contract_pass():
    given = {"feats": [MAP, MAP], "preact_feats": (MAP, MAP), "pooled_feat": torch.zeros(1, 4)}
    check_parts(Given(**given), "net", 8, (*given, "get_stage_channels"), 2)
    check_parts(Given(channels=None, feats=[MAP]), "net", 8, ("feats",))
    with refused("missing a required argument: 'x'; it is called as get_stage_channels()"):
        net = Given(feats=[MAP])
        net.get_stage_channels = lambda x: x
        check_parts(net, "net", 8, ("get_stage_channels",))
