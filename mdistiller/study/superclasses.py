"""What the classes are called, and CIFAR-100's superclasses (Krizhevsky, 2009, Table 1)."""

from collections.abc import Sequence

import numpy as np

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# The labels of both levels follow the alphabet; the superclass names keep the order of the coarse labels.
CIFAR100 = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
FINE = sorted(name for names in CIFAR100.values() for name in names.split())


def class_names(dataset: str, num_classes: int, own: Sequence[str] = ()) -> list[str]:
    """Return the names of the labels 0 .. num_classes - 1: the data set's `own`, or those that are known here; else
    their numbers.
    """
    known = own or {"cifar10": CIFAR10, "cifar100": FINE}.get(dataset, ())
    names = known if len(known) == num_classes else [str(label) for label in range(num_classes)]
    return [name.replace("_", " ") for name in names]


def coarse_labels(dataset: str) -> np.ndarray | None:
    """Return the superclass, in the order of CIFAR100, of each fine label, (100,); None for other data sets."""
    if dataset != "cifar100":
        return None
    home = {name: place for place, names in enumerate(CIFAR100.values()) for name in names.split()}
    return np.array([home[name] for name in FINE])
