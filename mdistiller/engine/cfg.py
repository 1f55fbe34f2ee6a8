"""The complete configuration, with the section of every method: `from mdistiller.engine.cfg import CFG`."""

from tqdm import tqdm
from yacs.config import CfgNode

from mdistiller import dataset, distillers, models  # noqa: F401  (they fill the registries and the sections)
from mdistiller.config import CFG, load

ALWAYS = ("EXPERIMENT", "DATASET", "DISTILLER", "SOLVER", "LOG")


def describe(cfg: CfgNode) -> str:
    """The configuration as YAML, without the sections of methods that are not in use."""
    used = {key: cfg[key] for key in cfg if key in ALWAYS or key == cfg.DISTILLER.TYPE or key in ("SEED", "DEVICE")}
    return CfgNode(used).dump()


def show_cfg(cfg: CfgNode) -> None:
    """Print what `describe` gives."""
    tqdm.write(describe(cfg))


__all__ = ["CFG", "describe", "load", "show_cfg"]
