import os

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, and what they start inherits this

import pytest
import torch
from helpers import save_teacher

torch.set_num_threads(1)


@pytest.fixture
def teacher_file(tmp_path):
    """A resnet8 for the ten digits, freshly initialised."""
    return save_teacher(tmp_path / "teacher.pth")
