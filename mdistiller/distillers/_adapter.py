"""The door for methods from outside: what a file written for mdistiller does not declare is read off its signatures."""

import inspect
import itertools

from mdistiller.distillers.base import Distiller

OFFERED = ("num_data", "labels")  # what `Distiller.needs` may ask for


class NamedTaskLosses:
    """The names of losses in which "ce" stands as a word of its own: ce, loss_ce."""

    def __contains__(self, name: str) -> bool:
        return "ce" in name.split("_")


def adapt(name: str, cls: type) -> type:
    """Return the method `cls`, with the declarations of Distiller that classes of a plug-in leave out.

    Its own `__init__` says by its parameters what it needs, its own `forward_train` whether it takes the teacher's
    logits. Raises TypeError for a class that is no Distiller, or that needs what nobody offers.
    """
    if not (isinstance(cls, type) and issubclass(cls, Distiller)):
        raise TypeError(f"the method {name} must be a class derived from mdistiller.distillers.Distiller")
    foreign = list(itertools.takewhile(lambda base: not _is_ours(base), cls.__mro__))
    own = {attribute for base in foreign for attribute in vars(base)}
    if "__init__" in own and "needs" not in own:
        cls.needs = tuple(word for word in OFFERED if word in inspect.signature(cls).parameters)
    if unknown := {*cls.needs} - {*OFFERED}:
        raise TypeError(f"the method {name} needs {', '.join(sorted(unknown))}; there are {' and '.join(OFFERED)}")
    if "forward_train" in own and "takes_teacher_logits" not in own:
        given = "logits_teacher" in inspect.signature(cls.forward_train).parameters
        cls.takes_teacher_logits = cls.takes_teacher_logits and given
    if foreign and "task_losses" not in own:
        cls.task_losses = NamedTaskLosses()
    return cls


def _is_ours(cls: type) -> bool:
    """Return whether the class is of this package. A plug-in's module lies there by name, so that its relative imports
    work.
    """
    return cls.__module__.startswith("mdistiller.") and "._plugin_" not in cls.__module__
