"""What feature methods share."""

import pytest
import torch
from methods import model
from torch import nn

from mdistiller.distillers.features import ConvReg, get_feat_shapes, pooled_width, unit
from mdistiller.errors import UserError
from mdistiller.models import given_parts


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
