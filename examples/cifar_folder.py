"""Write a part of CIFAR-100 as a folder of pictures, for configs/plans/cifar20.yaml.

python3 examples/cifar_folder.py data cifar20

From `data`, which is fetched where it lies nowhere, come the first 20 classes
in the order of their names, 100 pictures to learn from and 50 to test on each.
"""

import argparse
from pathlib import Path

from PIL import Image

from mdistiller.config import load
from mdistiller.dataset import load_dataset
from mdistiller.errors import UserError, run_command
from mdistiller.study.superclasses import class_names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of CIFAR-100")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--train", type=int, default=100, help="pictures of a class")
    parser.add_argument("--test", type=int, default=50, help="pictures of a class")
    a = parser.parse_args()
    if a.out.exists():
        raise UserError(f"{a.out}: is there already; name a new folder")
    data = load_dataset("cifar100", a.data, load(None, ["DATASET.TYPE", "cifar100"]).DATASET)
    names = class_names("cifar100", data.num_classes, data.class_names)
    parts = (
        ("train", data.train_images, data.train_labels, a.train),
        ("val", data.test_images, data.test_labels, a.test),
    )
    for split, images, labels, count in parts:
        for label, name in enumerate(names[: a.classes]):
            folder = a.out / split / name
            folder.mkdir(parents=True)
            for number, place in enumerate((labels == label).nonzero().flatten()[:count].tolist()):
                Image.fromarray(images[place].numpy()).save(folder / f"{number:03d}.png")
    print(f"written to {a.out}: {a.classes} classes, {a.train} pictures to learn from and {a.test} to test on in each")


if __name__ == "__main__":
    run_command(main)
