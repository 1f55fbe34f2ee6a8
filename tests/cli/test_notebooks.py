"""What mdistiller's two notebooks do, in a checkout's tools/visualizations: the teacher's logits against the
student's, and t-SNE of pooled features.
"""

import numpy as np
from helpers import save_teacher, script

NOTEBOOK = """
import numpy as np
import torch
from sklearn.manifold import TSNE
from tqdm import tqdm

from mdistiller.models import cifar_model_dict
from mdistiller.dataset import get_dataset
from mdistiller.engine.utils import load_checkpoint
from mdistiller.engine.cfg import CFG as cfg

cfg.defrost()
cfg.DISTILLER.TEACHER, cfg.DISTILLER.STUDENT, cfg.DATASET.TYPE = "resnet14", "resnet8", "cifar100"
cfg.freeze()
train_loader, val_loader, num_data, num_classes = get_dataset(cfg)
assert (num_data, num_classes) == (100, 100)

def load(name, path):
    model = cifar_model_dict[name][0](num_classes=num_classes)
    model.load_state_dict(load_checkpoint(path)["model"])
    return model.eval()

def outputs_of(model):
    logits, pooled, labels = [], [], []
    with torch.no_grad():
        for data, target in tqdm(val_loader):
            output, features = model(data)
            logits.append(output.data.cpu().numpy())
            pooled.append(features["pooled_feat"].data.cpu().numpy())
            labels.append(target.data.cpu().numpy())
    return map(np.concatenate, (logits, pooled, labels))

sums = []
for model in (load("resnet8", "../../download_ckpts/student"), load("resnet14", cifar_model_dict["resnet14"][1])):
    logits, pooled, labels = outputs_of(model)
    matrix = np.zeros((num_classes, num_classes))
    for row, label in zip(logits, labels):
        matrix[label] += row / (labels == label).sum()
    sums.append(matrix)
difference = np.abs(sums[0] - sums[1])
assert difference.shape == (100, 100) and np.isfinite(difference).all() and difference.max() > 0
places = TSNE(perplexity=5, max_iter=250).fit_transform(pooled)
assert places[labels == 3].shape == (1, 2)
"""


def test_the_notebooks_calls(tmp_path):
    folder = tmp_path / "tools" / "visualizations"
    teacher = tmp_path / "download_ckpts" / "cifar_teachers" / "resnet14_vanilla" / "ckpt_epoch_240.pth"
    for path in (folder, teacher.parent, tmp_path / "data" / "cifar-100-binary"):
        path.mkdir(parents=True)
    save_teacher(teacher, "resnet14", 100)
    save_teacher(tmp_path / "download_ckpts" / "student", "resnet8", 100)
    for name in ("train", "test"):
        records = np.random.default_rng(0).integers(0, 256, (100, 2 + 3072), dtype=np.uint8)
        records[:, 1] = np.arange(100)
        records.tofile(tmp_path / "data" / "cifar-100-binary" / f"{name}.bin")
    done = script(NOTEBOOK, folder)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
