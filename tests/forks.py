"""A checkout of a framework built as mdistiller is, small and in our own words, and method files as its users write."""

import textwrap
from pathlib import Path

BASE = """
import torch.nn as nn

class Distiller(nn.Module):
    def __init__(self, student, teacher):
        super(Distiller, self).__init__()
        self.student = student
        self.teacher = teacher

    def train(self, mode=True):
        self.training = mode
        for module in self.children():
            module.train(mode)
        self.teacher.eval()
        return self

    def get_learnable_parameters(self):
        return [v for k, v in self.student.named_parameters()]

    def get_extra_parameters(self):
        return 0

    def forward_train(self, **kwargs):
        raise NotImplementedError()

    def forward_test(self, image):
        return self.student(image)[0]

    def forward(self, **kwargs):
        if self.training:
            return self.forward_train(**kwargs)
        return self.forward_test(kwargs["image"])
"""

HEAD = "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\nfrom ._base import Distiller\n"
STEP = """
logits = self.student(image)[0]
return logits, {"loss_ce": F.cross_entropy(logits, target)}
"""


def class_text(
    name: str, init: str = "", step: str = STEP, parameters: str = "student, teacher, cfg",
    given: str = "image, target, **kwargs", base: str = "Distiller", supers: str = "student, teacher",
) -> str:  # fmt: skip
    """A method's class as its users write it: `init` behind super().__init__(`supers`), and `step` of `given`."""
    init, step = (textwrap.indent(textwrap.dedent(body).strip(), " " * 8) for body in (init, step))
    return (
        f"class {name}({base}):\n    def __init__(self, {parameters}):\n"
        f"        super({name}, self).__init__({supers})\n{init}\n\n"
        f"    def forward_train(self, {given}):\n{step}\n\n"
    )


def method(name: str, init: str = "", step: str = STEP, imports: str = "", **more: str) -> str:
    """The file of one method."""
    return f"{HEAD}{imports}\n{class_text(name, init, step, **more)}"


# by the cause that kept a file of its kind from running: its text
METHODS = {
    "never registers": method(
        "QuietKD", "self.weight = cfg.QUIET.WEIGHT",
        """
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        kd = self.weight * kd_loss(logits_student, logits_teacher, 4.0)
        return logits_student, {"loss_ce": F.cross_entropy(logits_student, target), "loss_kd": kd}
        """,
        "from .KD import kd_loss",
    ),
    "a name held here": method(
        "KD", "self.ratio = cfg.KD.LOSS.HARD_RATIO",
        """
        logits_student, _ = self.student(image)
        return logits_student, {"loss_of_the_fork": self.ratio * F.cross_entropy(logits_student, target)}
        """,
    ),
    "a sibling": method(
        "Margin", "",
        """
        logits, _ = self.student(image)
        return logits, {"loss_ce": own_helper(margin_loss(logits, target))}
        """,
        "from .margin import margin_loss\nfrom .KD import own_helper",
    ),
    "view of features": method(
        "Flat", "",
        """
        logits, student = self.student(image)
        with torch.no_grad():
            _, teacher = self.teacher(image)
        flat = [f["feats"][-1].view(len(image), -1) for f in (student, teacher)]
        grams = [F.normalize(f @ f.t()) for f in flat]
        image.view(len(image), -1)
        return logits, {"loss_ce": F.cross_entropy(logits, target), "loss_kd": F.mse_loss(*grams)}
        """,
    ),
    "arguments": method(
        "Places", 'self.register_buffer("seen", torch.zeros(num_data))',
        """
        assert (contrastive_index[:, 0] == idx).all()
        self.seen[contrastive_index.flatten()] = epoch
        logits, _ = self.student(image)
        return logits, {"loss_ce": F.cross_entropy(logits, target)}
        """,
        parameters="student, teacher, cfg, num_data", given="image, target, idx, contrastive_index, epoch",
    ),
    "two views": method(
        "Views", "",
        """
        weak, _ = self.student(image_weak)
        strong, _ = self.student(image_strong)
        assert not (image_weak == image_strong).all() and image_weak.view(-1).shape == image_strong.view(-1).shape
        return weak, {"loss_ce": F.cross_entropy(weak, target), "loss_kd": F.cross_entropy(strong, target)}
        """,
        given="image_weak, image_strong, target, **kwargs",
    ),
    "says cuda": method(
        "OnCuda", "self.scale = nn.Linear(1, 1).cuda()",
        """
        logits, _ = self.student(image)
        noise = torch.zeros(len(logits), 1, device="cuda") + torch.ones(1).to("cuda")
        return logits, {"loss_ce": F.cross_entropy(logits * noise.cuda(), target)}
        """,
    ),
}  # fmt: skip
NO_LOSS = "return self.student(image)[0], {}"
# outside the promise: each is one line
REFUSED = {
    "its own constructor": (
        method(
            "Args", step=NO_LOSS, parameters="args, student, second_teacher, cfg", supers="student, second_teacher"
        ),
        "Args: its constructor asks for args, second_teacher, which only its own program has",
    ),
    "its own trainer": (
        method("Mixed", step=NO_LOSS, given="image, target, mixed_image, **kwargs"),
        "Mixed: its forward_train asks for mixed_image, which only its own trainer gives",
    ),
    "no defaults": (
        method("Lost", "self.weight = cfg.LOST.WEIGHT", NO_LOSS),
        "Lost reads the key LOST, which nothing sets; give it in the YAML, or name in EXPERIMENT.PLUGINS the checkout",
    ),
    "a mistake": (
        method("Wrong", step="return self.student(image)[0] @ target, {}"),
        r"Wrong fails at .*Wrong.py:\d+: RuntimeError: ",
    ),
}  # fmt: skip
SIBLINGS = {
    "margin.py": "import torch.nn.functional as F\n\ndef margin_loss(v, y):\n    return F.multi_margin_loss(v, y)\n",
    "KD.py": "def own_helper(loss):\n    return 2 * loss\n",
}


def class_of(text: str) -> str:
    return text.split("class ")[1].split("(")[0]


def write_file(folder: Path, text: str, name: str = "") -> Path:
    """Write a method file, named as its class unless told otherwise, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name or class_of(text)}.py"
    file.write_text(text)
    return file


CFG = """
from yacs.config import CfgNode as CN
from .utils import log_msg
import a_module_that_nobody_has

def show_cfg(cfg):
    print(log_msg("CONFIG"))

CFG = CN()
CFG.EXPERIMENT = CN()
CFG.EXPERIMENT.PROJECT = "distill"
CFG.EXPERIMENT.NOTE = "fork"
CFG.LOG = CN()
CFG.LOG.WANDB = True
CFG.SOLVER = CN()
CFG.SOLVER.LR = 0.03
CFG.SOLVER.ALPHA = 2
CFG.KD = CN()
CFG.KD.TEMPERATURE = 3
CFG.KD.LOSS = CN()
CFG.KD.LOSS.CE_WEIGHT = 0.5
CFG.KD.LOSS.HARD_RATIO = 0.25
CFG.QUIET = CN()
CFG.QUIET.WEIGHT = 0.7
CFG.LEVEL = 3
"""
MODELS = """
import torch.nn as nn
from ..distillers._common import width

class Tiny(nn.Module):
    def __init__(self, num_classes=100):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width(), 3, 4), nn.Linear(width(), num_classes)

    def forward(self, x):
        f = self.conv(x).relu()
        pooled = f.mean((2, 3))
        return self.fc(pooled), {"feats": [f, f, f, f], "pooled_feat": pooled}

def tiny(**kwargs):
    return Tiny(**kwargs)
"""


def write_checkout(root: Path) -> Path:
    """Write a checkout with every method above, models, defaults, configurations and a trainer that must not run."""
    package = root / "mdistiller"
    files = {
        "__init__.py": "raise RuntimeError('the package of a checkout was executed')\n",
        "distillers/_base.py": BASE,
        "distillers/_common.py": "def width():\n    return 8\n",
        "distillers/KD.py": METHODS["a name held here"].replace("._base", "mdistiller.distillers._base"),
        "distillers/Heavy.py": "import a_module_that_nobody_has\n\nclass Heavy:\n    pass\n",
        "distillers/margin.py": SIBLINGS["margin.py"],
        "engine/__init__.py": "raise RuntimeError('the trainer of a checkout was executed')\n",
        "engine/cfg.py": CFG,
        "engine/utils.py": "def log_msg(text):\n    return text\n",
        "models/__init__.py": "from .cifar import cifar_model_dict, imagenet_model_dict\n",
        "models/cifar/__init__.py": "import os\nfrom .tiny import tiny\nfolder = os.path.dirname(__file__)\n"
        "cifar_model_dict = {'tiny': (tiny, folder + '/t.pth'), 'resnet8': (tiny, None)}\nimagenet_model_dict = {}\n",
        "models/cifar/tiny.py": MODELS.replace("from ..distillers", "from mdistiller.distillers"),
    }
    kd = "\n\ndef kd_loss(v, u, t):\n    import mdistiller.engine.utils as utils\n    utils.log_msg('')\n"
    files["distillers/KD.py"] += kd + "    return (v / t - u / t).square().mean()\n\n" + SIBLINGS["KD.py"]
    names = []
    for text in [*METHODS.values(), *(text for text, _ in REFUSED.values())]:
        name = class_of(text)
        names.append(name)
        files.setdefault(f"distillers/{name}.py", text)
    imports = "".join(f"from .{name} import {name}\n" for name in [*names, "Heavy"])
    entries = ", ".join(f"'{name.upper()}': {name}" for name in [*names, "Heavy"])
    files["distillers/__init__.py"] = f"{imports}\ndistiller_dict = {{{entries}}}\n"
    for name, text in files.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    configs = {
        "quiet.yaml": "DISTILLER: {TYPE: quiet_kd, TEACHER: tiny, STUDENT: resnet8}\nLEVEL: 4\n",
        "kd.yaml": "DISTILLER: {TYPE: KD, TEACHER: tiny, STUDENT: tiny}\nSOLVER: {ALPHA: 1.5}\n",
        "heavy.yaml": "DISTILLER: {TYPE: HEAVY, TEACHER: tiny, STUDENT: tiny}\n",
        "lost.yaml": "DISTILLER: {TYPE: KD, TEACHER: none_such, STUDENT: tiny}\n",
        "typo.yaml": "DISTILLER: {TYPE: KD, TEACHER: tiny, STUDENT: tiny}\nKD: {TEMPERATUR: 3}\n",
    }
    for name, text in configs.items():
        file = root / "configs" / "cifar100" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root
