"""Name -> object. A name is given once; an unknown name is answered with the nearest known ones."""

import contextlib
import difflib
import importlib
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping

from mdistiller.errors import UserError


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


class UnknownName(UserError, KeyError):
    """Raised by a Registry for a name that nobody registered."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return self.args[0]


class Registry(UserDict):
    """A dict from name to object that refuses another object under a name it already holds.

    `own` holds what is built in or was entered by hand. What a plug-in brings, inside `collecting`, stands in its
    place while `use` says so; with `any_case` also where case and underscores differ. Names of a plug-in that is out of
    use stay readable, for those who look at its runs, but are not `active`. `accept(name, object)`, where a package
    sets it, returns what is entered: the door for objects from outside. `libraries`, {prefix: function}, answer names
    such as prefix:NAME, which are listed nowhere: the function returns the object that NAME means, or raises
    UnknownName.
    """

    def __init__(self, kind: str, any_case: bool = False):
        self.kind, self.any_case = kind, any_case
        self.own: dict[str, object] = {}
        self.brought: set[str] = set()  # names of plug-ins, in use or not
        self.out_of_use: set[str] = set()
        self.accept: Callable[[str, object], object] | None = None
        self.libraries: dict[str, Callable[[str], object]] = {}
        super().__init__()
        REGISTRIES[kind] = self

    def __setitem__(self, name: str, item: object) -> None:
        held = self.own if collected is None else collected.setdefault(self.kind, {})
        if collected is not None:
            if self.any_case:
                name = next((known for known in (*self.own, *held) if fold(known) == fold(name)), name)
            self.brought.add(name)
        if self.accept is not None:
            item = self.accept(name, item)
        if name in held and held[name] is not item and not same_definition(held[name], item):
            raise ValueError(f"{self.kind} '{name}' is registered already, by {held[name]!r}; pick another name")
        held[name] = item
        super().__setitem__(name, item)

    def __missing__(self, name: str) -> object:
        prefix, colon, rest = str(name).partition(":")
        if colon and prefix in self.libraries:
            return self.libraries[prefix](rest)
        raise UnknownName(unknown(self.kind, name, self.data))

    def refusal(self, name: str) -> str | None:
        """Return the line on why `name` is nobody's, None where it is somebody's."""
        try:
            self[name]
        except UnknownName as error:
            return str(error)
        return None

    @property
    def active(self) -> dict[str, object]:
        """What a configuration may choose, by name."""
        return {name: item for name, item in self.data.items() if name not in self.out_of_use}

    def named(self, name: str) -> str:
        """Return the active name that `name` means, whose case and underscores do not count; `name` if none is."""
        if name in self.active:
            return name
        return next((known for known in self.active if fold(known) == fold(name)), name)

    def name_of(self, item: object) -> str | None:
        """Return the active name that `item` has here, None without one."""
        return next((name for name, held in self.active.items() if held is item), None)


def same_definition(first: object, second: object) -> bool:
    """Return whether two classes or functions are one definition, executed again as a notebook's cell is."""
    places = []
    for item in (first, second):
        item = item[0] if isinstance(item, tuple) else item  # a model's entry
        places.append((getattr(item, "__module__", None), getattr(item, "__qualname__", "")))
    return places[0] == places[1] and places[0][0] == "__main__" and "<" not in places[0][1]


def is_ours(item: object) -> bool:
    """Return whether a class or a function is this package's, or torch's or Python's beneath it."""
    return item is object or getattr(item, "__module__", "").startswith(("mdistiller.", "torch."))


def fold(name: str) -> str:
    """Return what remains of a name where neither case nor underscores count."""
    return name.casefold().replace("_", "")


REGISTRIES: dict[str, Registry] = {}  # by kind
collected: dict[str, dict[str, object]] | None = None  # of the plug-in that is being imported

distillers = Registry("method", any_case=True)
cifar_models = Registry("model")
imagenet_models = Registry("ImageNet model")
text_models = Registry("text model")
detectors = Registry("detector")
datasets = Registry("dataset")
temperature_rules = Registry("temperature rule")


def task_of(dataset: str) -> str:
    """Return what networks learn on a data set, DATASET.TYPE: classification, text or detection."""
    return getattr(datasets.get(dataset), "task", "classification")


OWN_NETWORKS = {"text": text_models, "detection": detectors}  # by task, where images of one class have others


def networks_of(dataset: str) -> Registry | None:
    """Return the networks that a data set has for itself, None where it takes those of images of one class each."""
    return OWN_NETWORKS.get(task_of(dataset))


def constructor(name: str, dataset: str = "") -> Callable:
    """Return the constructor(num_classes=...) of the network that `name` means on that data set, DATASET.TYPE: on
    imagenet the names of imagenet_models come first; text and detection have networks of their own. Raises UnknownName.
    """
    if (own := networks_of(dataset)) is not None:
        return own[name]
    if dataset == "imagenet" and name in imagenet_models:
        return imagenet_models[name]
    if name not in cifar_models:  # of a data set that is not imported yet
        for others in OWN_NETWORKS.values():
            if name in others:
                return others[name]
    return cifar_models[name][0]


def name_and_file(text: str) -> tuple[str, str]:
    """Return (name, file) of a network that is written NAME or NAME:file; NAME may have a library's prefix."""
    prefix, _, rest = text.partition(":")
    name, _, file = rest.partition(":") if prefix in cifar_models.libraries else (prefix, "", rest)
    return (f"{prefix}:{name}" if prefix in cifar_models.libraries else name), file


def model_refusal(name: str, dataset: str) -> str | None:
    """Return the line on why a configuration may not choose the network `name` on that data set, None where it may."""
    if (own := networks_of(dataset)) is not None:
        line = own.refusal(name)
        return f"the model {name} is a classifier; {line}" if line and name in cifar_models else line
    here = [*cifar_models.active, *(imagenet_models.active if dataset == "imagenet" else [])]
    if name in here:
        return None
    for task, others in OWN_NETWORKS.items():
        if others.refusal(name) is None:
            takers = " or ".join(sorted(known for known in datasets.active if task_of(known) == task))
            return f"the model {name} is {'one of text' if task == 'text' else 'a detector'}; set DATASET.TYPE {takers}"
    if name.partition(":")[0] in cifar_models.libraries:
        return cifar_models.refusal(name)
    return f"{unknown(cifar_models.kind, name, here)}; timm:NAME and tv:NAME for those of timm and torchvision"


@contextlib.contextmanager
def collecting() -> Iterator[dict[str, dict[str, object]]]:
    """Gather what is entered inside, {kind: {name: object}}, apart from what is built in, whose names it may bear; as
    the kind "default" the values of configuration keys.
    """
    global collected
    before, collected = collected, {}
    try:
        yield collected
    except BaseException:
        use([])  # nothing of it stays in a built-in's place
        raise
    finally:
        collected = before


def use(brought: Iterable[Mapping[str, Mapping[str, object]]]) -> None:
    """Put what is built in back into its place, then what each plug-in has `brought`, the last one's first."""
    brought = list(brought)
    for kind, registry in REGISTRIES.items():
        registry.data |= {name: registry.own[name] for name in registry.brought if name in registry.own}
        registry.out_of_use = registry.brought - {*registry.own}
        for one in brought:
            registry.data |= one.get(kind, {})
            registry.out_of_use -= {*one.get(kind, {})}


def fill() -> None:
    """Import the packages that register themselves: models, methods with their sections and rules, data sets."""
    for package in ("models", "distillers", "dataset"):
        importlib.import_module(f"mdistiller.{package}")
