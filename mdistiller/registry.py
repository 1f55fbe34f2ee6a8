"""Name -> object. A name is given once; an unknown name is answered with the nearest known ones."""

import difflib
import importlib
from collections import UserDict
from collections.abc import Callable, Iterable


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Return the names of `known` that look most like `name`, whatever its case."""
    by_fold = {k.casefold(): k for k in known}
    close = difflib.get_close_matches(str(name).casefold(), by_fold, n=count, cutoff=0.5)
    return [by_fold[c] for c in close]


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Return one line: what is unknown, the nearest name and every name there is."""
    known = sorted(known)
    close = nearest(str(name), known)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown {kind} '{name}'; {hint}known: {', '.join(known) or 'none'}"


class UnknownName(KeyError):
    """Raised by a Registry for a name that nobody registered."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return self.args[0]


class Registry(UserDict):
    """A dict from name to object that refuses a second object under a name it already holds.

    `accept(name, object)`, where a room sets it, returns what is entered: the door for objects from plug-ins.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.accept: Callable[[str, object], object] | None = None
        super().__init__()

    def __setitem__(self, name: str, item: object) -> None:
        if self.accept is not None:
            item = self.accept(name, item)
        if name in self.data and self.data[name] is not item:
            raise ValueError(f"{self.kind} '{name}' is registered already, by {self.data[name]!r}; pick another name")
        super().__setitem__(name, item)

    def __missing__(self, name: str) -> object:
        raise UnknownName(unknown(self.kind, name, self.data))


distillers = Registry("method")
cifar_models = Registry("model")
imagenet_models = Registry("ImageNet model")
datasets = Registry("dataset")
temperature_rules = Registry("temperature rule")


def fill() -> None:
    """Import the rooms whose modules register themselves: models, methods with their sections and rules, data sets."""
    for room in ("models", "distillers", "dataset"):
        importlib.import_module(f"mdistiller.{room}")
