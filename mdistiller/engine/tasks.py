"""The tasks that there are, by the name that a data set has of its own."""

from yacs.config import CfgNode

from mdistiller.engine.detection import Detection
from mdistiller.engine.task import Task
from mdistiller.engine.text import Text
from mdistiller.registry import task_of

TASKS: dict[str, Task] = {"classification": Task(), "text": Text(), "detection": Detection()}


def task_of_run(cfg: CfgNode) -> Task:
    """Return the task of the data set that DATASET.TYPE names."""
    return TASKS[task_of(cfg.DATASET.TYPE)]
