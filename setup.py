"""`pip install -e .`, or `python3 setup.py develop` where setuptools still has it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
requirements = [line for line in (here / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]

setup(
    name="mdistiller",
    version=re.search(r'__version__ = "(.+?)"', (here / "mdistiller" / "__init__.py").read_text())[1],
    description="Knowledge distillation of image classifiers: exact, fast, reproducible; with DTKD",
    packages=find_packages(include=["mdistiller", "mdistiller.*"]),
    package_data={"mdistiller.study": ["report.html", "report.css", "report.js"]},
    python_requires=">=3.10",
    install_requires=requirements,
    extras_require={
        "export": ["onnx", "onnxscript", "onnxruntime", "openvino"],
        "slurm": ["submitit>=1.5"],
        "pictures": ["timm>=1.0"],
        "detection": ["faster-coco-eval>=1.6"],
        "trl": ["trl>=1.16", "peft"],
        "dev": [
            "pytest>=8",
            "faster-coco-eval>=1.6",
            "pycocotools",
            "pytest-xdist",
            "ruff>=0.6",
            "hypothesis",
            "selenium>=4.15",
            "submitit>=1.5",
            "timm>=1.0",
        ],
    },
)
