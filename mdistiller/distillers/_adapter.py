"""The door for methods from outside: what a file written for mdistiller does not declare is read off its signatures."""

import inspect

import torch
from torch import Tensor, nn

from mdistiller.config import TWO_VIEWS, Absent
from mdistiller.device import without_cuda
from mdistiller.distillers.base import Distiller
from mdistiller.errors import UserError, users_code
from mdistiller.registry import is_ours

USUAL = ("student", "teacher", "cfg")
OFFERED = ("num_data", "labels")  # what `Distiller.needs` may ask for
IN_A_STEP = ("image", "target", "index", "idx", "epoch")  # what every step has
ON_REQUEST = ("logits_teacher", "contrastive_index", "image_weak", "image_strong")  # for those that name it


class NamedTaskLosses:
    """The names of losses in which "ce" stands as a word of its own: ce, loss_ce."""

    def __contains__(self, name: str) -> bool:
        return "ce" in name.split("_")


def adapt(name: str, cls: object) -> type:
    """Return the method `cls` with the declarations of Distiller that a class from outside leaves out.

    Its own `__init__` says by its parameters what it needs, its own `forward_train` whether it takes the teacher's
    logits and two views. One that was not entered by register_method comes back as a subclass that takes all that a
    step has and hands on what it names (`_wrap`); one that asks for what nobody has, as a class that cannot be chosen,
    with the reason in `refused`. Raises TypeError for what is no method.
    """
    if isinstance(cls, Absent):
        return _refuse(name, f"{name} {cls.reason}")
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "forward_train")):
        raise TypeError(f"the method {name} must be a class derived from mdistiller.distillers.Distiller")
    bases = [base for base in cls.__mro__ if not is_ours(base)]
    # what was read off a base's signatures, when that was entered, does not hold for a class derived from it
    own = {attribute for base in bases for attribute in vars(base) if attribute not in vars(base).get("_adapted", ())}
    if not own:
        return cls
    before = {*vars(cls)}
    init, step = _constructor(cls), _step(cls)
    if "__init__" in own and "needs" not in own:
        cls.needs = tuple(word for word in OFFERED if word in init)
    if "forward_train" in own and "takes_teacher_logits" not in own:
        cls.takes_teacher_logits = getattr(cls, "takes_teacher_logits", True) and "logits_teacher" in step
    if "forward_train" in own and "takes_strong_view" not in own:
        cls.takes_strong_view = bool({"image_weak", "image_strong"} & step)
    if "task_losses" not in own:
        cls.task_losses = NamedTaskLosses()
    cls._adapted = ({*vars(cls)} - before) | vars(cls).get("_adapted", set())
    if unknown := {*cls.needs} - {*OFFERED}:
        raise TypeError(f"the method {name} needs {', '.join(sorted(unknown))}; there are {' and '.join(OFFERED)}")
    declared = getattr(cls, "declared", None) is cls
    return _wrap(name, cls) if own & {"forward_train", "__init__"} and not declared else cls


def _refuse(name: str, reason: str) -> type:
    return type(name, (Distiller,), {"refused": reason, "__module__": __name__})


def _parameters(function) -> tuple[dict[str, bool], set]:
    """Return {name: whether it has a default} of a method's parameters without `self`, and the kinds of *args and
    **kwargs among them.
    """
    parameters = [*inspect.signature(function).parameters.values()][1:]
    rest = {p.kind for p in parameters} & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    return {p.name: p.default is not p.empty for p in parameters if p.kind not in rest}, rest


def _constructor(cls: type) -> dict[str, bool]:
    """Return the parameters of a class's constructor, as `_parameters`; *args and **kwargs are its base's."""
    found: dict[str, bool] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            named, rest = _parameters(base.__init__)
            found = found | {name: default for name, default in named.items() if name not in found}
            if not rest or is_ours(base):
                break
    return found


def _step(cls: type) -> set[str]:
    """Return what `forward_train` asks for: its parameters, and what it looks up in **kwargs by name."""
    named, rest = _parameters(cls.forward_train)
    code = getattr(inspect.unwrap(cls.forward_train), "__code__", None)
    looked_up = {*IN_A_STEP} | {word for word in ON_REQUEST if code and word in code.co_consts}
    return {*named} | (looked_up if rest else set())


def _takes_by_place(cls: type, init: dict[str, bool]) -> bool:
    """Return whether a constructor takes student, teacher and cfg without their names: as *args, or three of its own
    names, in that order as far as it has ours.
    """
    in_order = all(word not in USUAL or word == place for word, place in zip(init, USUAL, strict=False))
    own_names = len(init) == 3 and not any(init.values()) and {*init} - {*USUAL, *OFFERED} and in_order
    return bool(own_names) or _parameters(cls.__init__)[1] == {inspect.Parameter.VAR_POSITIONAL}


def _wrap(name: str, cls: type) -> type:
    """Return a subclass of `cls` whose constructor and `forward_train` take everything and hand on what `cls` names.

    Inside, `.cuda()` and device="cuda" mean the run's device, the networks' features are contiguous, as mdistiller's
    are, and an exception becomes one line that names the file and the place.
    """
    init, step = _constructor(cls), _step(cls)
    by_place = _takes_by_place(cls, init)
    unknown = [word for word, default in init.items() if not default and word not in (*USUAL, *OFFERED)]
    if unknown and not by_place:
        return _refuse(name, f"{name}: its constructor asks for {', '.join(unknown)}, which only its own program has")
    optional = {word for word, default in _parameters(cls.forward_train)[0].items() if default}
    if unknown := sorted(step - optional - {*IN_A_STEP, *ON_REQUEST}):
        asked = ", ".join(unknown)
        return _refuse(name, f"{name}: its forward_train asks for {asked}, which only its own trainer gives")
    contrasts, two_views = "contrastive_index" in step, bool({"image_weak", "image_strong"} & step)
    handed_on = [word for word in (*IN_A_STEP, *ON_REQUEST) if word in step]

    class Foreign(cls):
        capturable = False
        needs = tuple(word for word in OFFERED if word in cls.needs or contrasts)
        reads = (*getattr(cls, "reads", ()), *(("CRD.",) if contrasts else ()))
        needs_teacher = getattr(cls, "needs_teacher", True) and (by_place or "teacher" in init)

        def __init__(self, student: nn.Module, teacher: nn.Module | None, cfg, **offered):
            if two_views and cfg.SOLVER.TRAINER not in TWO_VIEWS:
                raise UserError(f"{name} asks for a weak and a strong view of each image: set SOLVER.TRAINER ours")
            given = {"student": student, "teacher": teacher, "cfg": cfg}
            with users_code(name), without_cuda(cfg.DEVICE):
                if by_place:
                    super().__init__(*given.values())
                else:
                    super().__init__(**_chosen(given | offered, init))
            if contrasts:
                from mdistiller.distillers.CRD import Negatives  # which needs this package

                labels = offered["labels"] if cfg.CRD.MODE == "exact" else None
                self._negatives, self._draws = Negatives(offered["num_data"], labels), cfg.CRD.NCE.K
            if not isinstance(getattr(self, "student", None), nn.Module):
                raise UserError(f"{name}: its constructor leaves no network as self.student; call super().__init__")
            if not hasattr(self, "teacher"):  # as mdistiller's Vanilla
                self.teacher = None
            _give_contiguous_features(self)

        def get_learnable_parameters(self) -> list[nn.Parameter]:
            with users_code(name):
                found = list(super().get_learnable_parameters())
            if not all(isinstance(part, nn.Parameter) for part in found):
                raise UserError(f"{name}: get_learnable_parameters must give a list of parameters, no groups of them")
            return found

        def forward_train(self, image: Tensor, target: Tensor, **given) -> tuple[Tensor, dict[str, Tensor]]:
            image = image.contiguous()
            given |= {"image": image, "target": target, "image_weak": image, "idx": given.get("index")}
            if "image_strong" in given:
                given["image_strong"] = given["image_strong"].contiguous()
            if contrasts and "contrastive_index" not in given:
                index = given["index"]
                given["contrastive_index"] = torch.cat([index[:, None], self._negatives(index, target, self._draws)], 1)
            with users_code(name), without_cuda(image.device):
                return super().forward_train(**_chosen(given, handed_on))

        if not issubclass(cls, Distiller):

            def train(self, mode: bool = True) -> nn.Module:
                super().train(mode)
                if cls.train is nn.Module.train and self.teacher is not None:
                    self.teacher.eval()
                return self

            def forward(self, **given):
                return self.forward_train(**given) if self.training else self.forward_test(given["image"])

    for word, value in vars(Distiller).items():  # a base class of the file's own lacks what ours declares
        if not word.startswith("__") and not hasattr(Foreign, word):
            setattr(Foreign, word, value)
    Foreign.__name__, Foreign.__qualname__ = cls.__name__, cls.__qualname__
    Foreign.__module__, Foreign.__doc__ = cls.__module__, cls.__doc__
    return Foreign


def _chosen(given: dict, names) -> dict:
    return {name: given[name] for name in names if name in given}


def _give_contiguous_features(distiller: nn.Module) -> None:
    """Let student and teacher give contiguous maps in training, which mdistiller's methods `view`."""

    def hook(_network: nn.Module, _inputs: tuple, output: object) -> object:
        if not (distiller.training and isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], dict)):
            return None
        return output[0], {name: _contiguous(value) for name, value in output[1].items()}

    for network in (getattr(distiller, "student", None), getattr(distiller, "teacher", None)):
        if network is not None:
            network.register_forward_hook(hook)


def _contiguous(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_contiguous, value))
    return value.contiguous() if isinstance(value, Tensor) else value
