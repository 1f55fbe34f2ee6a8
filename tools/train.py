"""mdistiller's name for tools/train_ours.py, with the same options.

python3 tools/train.py --cfg configs/cifar100/kd/res32x4_res8x4.yaml [--logit-stand --base-temp 2 --kd-weight 9]
"""

import _package  # noqa: F401
from train_ours import main

from mdistiller.errors import run_command

if __name__ == "__main__":
    run_command(main)
