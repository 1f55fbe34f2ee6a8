"""mdistiller's name for tools/train_ours.py, with the same options.

python3 tools/train.py --cfg configs/cifar100/kd/res32x4_res8x4.yaml [--logit-stand --base-temp 2 --kd-weight 9]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from train_ours import main  # noqa: E402

from mdistiller.errors import run_command  # noqa: E402

if __name__ == "__main__":
    run_command(main)
