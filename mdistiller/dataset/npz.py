"""A .npz file of images, as MedMNIST's are: train_images, train_labels, test_images, test_labels."""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from mdistiller import files
from mdistiller.dataset._arrays import of_arrays
from mdistiller.dataset._images import ImageSet
from mdistiller.dataset._registry import register_dataset
from mdistiller.errors import UserError

WANTED = ("train_images", "train_labels", "test_images", "test_labels")


@register_dataset("npz")
def npz(root: Path) -> ImageSet:
    """Read the file `root`: arrays as md.image_set takes them, images of any height and width, labels (N,) or (N, 1).
    Whether a mirror image is still of its class, only the user knows, so training crops alone. Raises UserError for
    anything else, pickled arrays among them.
    """
    with files.open_regular(root, "the .npz file itself as DATASET.ROOT") as file:
        try:
            arrays = _arrays(root, file)
        except UserError:
            raise
        except Exception as error:  # zipfile, zlib and numpy raise many kinds for foreign bytes
            reason = str(error) or type(error).__name__
            raise UserError(
                f"{root}: is not a readable .npz file of plain arrays ({reason}); point DATASET.ROOT to the file itself"
            ) from None
    try:
        return of_arrays(arrays[:2], arrays[2:], 0, "crop")
    except UserError as error:
        raise UserError(f"{root}: {error}") from None


def _arrays(path: Path, file: BinaryIO) -> list[np.ndarray]:
    archive = np.load(file, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{path}: is a single array; expected a .npz file with {', '.join(WANTED)}")
    missing = [name for name in WANTED if name not in archive.files]
    if missing:
        raise UserError(f"{path}: lacks {' and '.join(missing)}; it holds {', '.join(archive.files) or 'nothing'}")
    sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.zip.infolist()}
    files.check_fits(path, 3 * sum(sizes[name] for name in WANTED))  # grey images become three channels
    return [np.asarray(archive[name]) for name in WANTED]
