"""Plug-ins: a Python file of the user's, or a whole checkout of a framework that is built as mdistiller is.

A plug-in's modules are imported under names of their own, so that two plug-ins never meet; which file an import in them
means is decided here. What they bring is kept with them, for it stands in the registries only where a configuration
names them.
"""

import ast
import builtins
import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from mdistiller import registry
from mdistiller.config.keys import leaves, role
from mdistiller.errors import UserError

NOT_RUN = ("engine",)  # packages of a checkout whose __init__ would bring its trainer and what that requires
MODEL_DICTS = {  # of two entries by one name in one registry the first counts
    "cifar_model_dict": registry.cifar_models,
    "tiny_imagenet_model_dict": registry.cifar_models,
    "imagenet_model_dict": registry.imagenet_models,
}


class Absent(NamedTuple):
    """Stands for what a plug-in could not import."""

    reason: str


class Package:
    """The modules of one plug-in: found, executed and kept.

    `root`: the folder of the package as the files name it (mdistiller), for a checkout; its files come before ours.
    `folder`: that of a single `file`; there a module beside it comes before ours if it has what is asked for.
    """

    def __init__(self, alias: str, root: Path | None, file: Path):
        self.alias, self.root, self.file, self.folder = alias, root, file, file.parent
        self.own_names = {"mdistiller"} | ({root.name} if root else set())
        self.modules: dict[str, ModuleType] = {}
        self.texts: dict[str, str] = {}  # of the files that were executed, by their modules' names
        self.builtins = vars(builtins) | {"__import__": self.import_}

    def import_(self, name: str, globals=None, locals=None, fromlist=(), level: int = 0) -> ModuleType:
        """Do what `__import__`, whose arguments these are, does for the statements in this plug-in's files."""
        full = importlib.util.resolve_name("." * level + name, globals["__package__"]) if level else name
        head, _, rest = full.partition(".")
        names = [word for word in fromlist or () if word != "*"]
        if head in {self.alias, *self.own_names}:
            module = self.module(rest, names)
            for word in names:
                if not hasattr(module, word):  # a submodule, or the import statement will say that there is none
                    with contextlib.suppress(ModuleNotFoundError):
                        setattr(module, word, self.module(f"{rest}.{word}".lstrip(".")))
            return module if fromlist else self.module("")
        if not level and self.beside(head) and not _exists(head):
            module = self.execute(full, self.beside(full.replace(".", "/")) or self.beside(head))
            return module if fromlist or "." not in full else self.execute(head, self.beside(head))
        return builtins.__import__(name, globals, locals, fromlist, level)

    def beside(self, name: str) -> Path | None:
        """Return the file of a module that lies beside the plug-in's package or file, as scripts import them."""
        return _file_of(self.root.parent if self.root else self.folder, name)

    def module(self, rest: str, names: Sequence[str] = ()) -> ModuleType:
        """Return the module that mdistiller.<rest> means here, which has the `names`, if any module has them."""
        own = self.own_file(rest)
        if self.root and (own or not rest):
            return self.execute(rest, own)
        if not rest:
            return importlib.import_module("mdistiller")
        full = f"mdistiller.{rest}"
        if own and own != self.file and names:
            beside = self.execute(rest, own)
            if all(hasattr(beside, word) for word in names):
                return beside
        if _exists(full):
            ours = importlib.import_module(full)
            lacks = [word for word in names if not hasattr(ours, word) and not _exists(f"{full}.{word}")]
            if not (lacks and own):
                return ours
        if own:
            return self.execute(rest, own)
        raise ModuleNotFoundError(f"No module named '{full}'", name=full)

    def own_file(self, rest: str) -> Path | None:
        if self.root:
            return _file_of(self.root, rest.replace(".", "/"))
        package, _, name = rest.rpartition(".")  # a single file lies among the methods
        return _file_of(self.folder, name) if package in ("distillers", "") else None

    def execute(self, rest: str, file: Path | None) -> ModuleType:
        """Return the module of `file`, executed at its first import; an empty package where there is none."""
        if rest in self.modules:
            return self.modules[rest]
        is_package = file is None or file.name == "__init__.py"
        if rest and self.root:
            parent = rest.rpartition(".")[0]
            if parent not in self.modules:
                self.execute(parent, _file_of(self.root, parent.replace(".", "/")) if parent else None)
            if rest in self.modules:  # its parent has imported it
                return self.modules[rest]
        name = f"{self.alias}.{rest}".rstrip(".")
        spec = importlib.util.spec_from_loader(name, None, origin=str(file), is_package=is_package)
        module = importlib.util.module_from_spec(spec)
        module.__file__ = str(file)
        module.__package__ = name if is_package else name.rpartition(".")[0]
        module.__dict__["__builtins__"] = self.builtins
        self.modules[rest] = sys.modules[name] = module
        if file is None or rest in NOT_RUN:
            return module
        text = file.read_text(encoding="utf-8")
        try:
            tree = ast.parse(text, str(file))
            careful = is_package or rest == "engine.cfg"
            for part in tree.body if careful else [tree]:
                _run(part, module, file, careful)
        except BaseException:
            del self.modules[rest], sys.modules[name]
            raise
        self.texts[name] = text
        parent, _, last = rest.rpartition(".")
        if last and parent in self.modules:
            setattr(self.modules[parent], last, module)  # for `import a.b.c`, of which Python sees a
        return module


class Plugin:
    """What one entry of EXPERIMENT.PLUGINS brings.

    `brought`: {kind of registry: {name: object}}. `defaults`: values of configuration keys, {full name: value}, below
    what the YAML says. `text`: its source, in which the keys are looked for that it reads.
    """

    def __init__(self, path: Path, root: Path | None, digest: str):
        self.path, self.digest = path, digest
        self.package = Package(f"mdistiller_plugin_{digest}", root, path)
        from mdistiller.device import without_cuda  # which needs torch, as every plug-in does

        declared: dict[str, object] = {}
        with registry.collecting() as self.brought, without_cuda("auto"):
            if root:
                declared = self.load_checkout()
            else:
                self.enter_classes(self.package.execute(f"distillers.{path.stem}", path))
        registered = self.brought.pop("default", {})
        self.closed = {key.rpartition(".")[0] for key in registered}  # sections whose keys are all declared
        self.defaults: dict[str, object] = registered | declared

    @property
    def text(self) -> str:
        return "".join(self.package.texts.values())

    @property
    def code(self) -> str:
        """Its text without that of engine/cfg.py, which only declares keys."""
        return self.code_without(set())

    def code_without(self, modules: Set[str]) -> str:
        texts = self.package.texts.items()
        return "".join(text for name, text in texts if name not in modules and not name.endswith(".engine.cfg"))

    def load_checkout(self) -> dict[str, object]:
        """Enter the methods and models of a checkout, and return its defaults."""
        package = self.package
        distillers = package.module("distillers")
        methods = getattr(distillers, "distiller_dict", None)
        for name, cls in methods.items() if isinstance(methods, Mapping) else ():
            try:
                registry.distillers[str(name)] = cls
            except TypeError as error:  # a function, say; the others can be chosen
                registry.distillers[str(name)] = Absent(f"cannot be chosen: {error}")
        for module in list(package.modules.values()):
            if not isinstance(methods, Mapping):
                self.enter_classes(module)
        if package.own_file("models"):
            models = package.module("models")
            for name, held in MODEL_DICTS.items():
                for model, entry in (getattr(models, name, None) or {}).items():
                    if model not in self.brought.get(held.kind, {}):
                        held[model] = entry
        tree = getattr(package.module("engine.cfg"), "CFG", {}) if package.own_file("engine.cfg") else {}
        return {key: value for key, value in leaves(tree).items() if role(key) == "computes"}

    def enter_classes(self, module: ModuleType) -> None:
        """Enter each class that the module defines with a `forward_train`, by its name, unless the module did."""
        entered = {(cls.__module__, cls.__qualname__) for cls in self.brought.get("method", {}).values()}
        for name, cls in list(vars(module).items()):
            own = isinstance(cls, type) and cls.__module__ == module.__name__
            if own and "forward_train" in dir(cls) and (cls.__module__, cls.__qualname__) not in entered:
                registry.distillers[name] = cls

    def defaults_for(self, method: str) -> dict[str, object]:
        """Return the defaults without the sections of methods other than `method`, unless its code names them, or that
        of a module that holds no method.
        """
        methods = self.brought.get("method", {})
        own = {base.__module__ for base in methods[method].__mro__} if method in methods else set()
        text = self.code_without({cls.__module__ for cls in methods.values()} - own)
        others = {registry.fold(name) for name in registry.distillers} - {registry.fold(method)}
        return {
            key: value
            for key, value in self.defaults.items()
            if registry.fold(key.split(".")[0]) not in others or f".{key.split('.')[0]}" in text
        }


PLUGINS: dict[str, Plugin] = {}  # by digest


def load_plugin(path: Path) -> Plugin:
    """Import the plug-in at `path`, a Python file or a checkout's folder. The same content is imported once in a
    process. Whatever its code raises is raised.
    """
    path = path.resolve()
    root = package_root(path) if path.is_dir() else None
    if path.is_dir() and root is None:
        raise UserError(f"EXPERIMENT.PLUGINS: {path} holds no folder distillers with an __init__.py; name a checkout")
    hasher = hashlib.sha256(str(path).encode())
    for file in sorted(root.rglob("*.py")) if root else [path]:
        hasher.update(str((file, file.stat().st_mtime_ns)).encode() if root else file.read_bytes())
    digest = hasher.hexdigest()[:8]
    if digest not in PLUGINS:
        PLUGINS[digest] = Plugin(path, root, digest)
    return PLUGINS[digest]


def find_plugin(name: str, folder: Path) -> Path | None:
    """Return the Python file or the checkout that `name` means here or in `folder`; None where there is none."""
    options = (Path(name), folder / name)
    return next((p for p in options if os.path.isdir(p) or os.path.isfile(p) and p.suffix == ".py"), None)


def activate(digests: Iterable[str]) -> None:
    """Let the registries hold what these plug-ins bring, and what is built in where no other plug-in is named."""
    registry.use(PLUGINS[digest].brought for digest in digests)


def used_code(digests: Iterable[str], used: Mapping[str, Sequence[str]]) -> str:
    """Return a digest of the text of the plug-ins that bring something of `used`, {kind: names}; empty without one."""
    texts = [
        text for digest in digests if _found(digest, used) for text in sorted(PLUGINS[digest].package.texts.values())
    ]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16] if texts else ""


def _found(digest: str, used: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return {kind: those of its `used` names that the plug-in brings}, without kinds of which it brings none."""
    brought = PLUGINS[digest].brought
    found = {
        kind: [name for name in dict.fromkeys(names) if name in brought.get(kind, {})] for kind, names in used.items()
    }
    return {kind: names for kind, names in found.items() if names}


def in_place_of_built_in(digests: Iterable[str], used: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield a line for each plug-in on what it brings of `used`, {kind: names}, and for one of which nothing is."""
    digests = list(digests)
    for place, digest in enumerate(digests):
        plugin, found = PLUGINS[digest], _found(digest, used)
        held = sorted(name for names in plugin.brought.values() for name in names)
        if not held:
            yield f"plug-in {plugin.path.name}: brings no method, model, data set or temperature rule"
        elif not found:
            yield f"plug-in {plugin.path.name}: this run uses nothing of it; it brings {', '.join(held)}"
        for kind, names in found.items():
            replaced = [name for name in names if name in registry.REGISTRIES[kind].own]
            later = [name for name in names if any(_found(other, {kind: [name]}) for other in digests[place + 1 :])]
            if later:
                yield f"plug-in {plugin.path.name}: its {kind} {' and '.join(later)} gives way to a later plug-in's"
            else:
                instead = f", in place of the built-in {' and '.join(replaced)}" if replaced else ""
                yield f"plug-in {plugin.path.name}: {kind} {' and '.join(names)}{instead}"


def _run(part: ast.AST, module: ModuleType, file: Path, careful: bool) -> None:
    """Execute a statement or a tree in `module`. Where `careful`, names that cannot be imported become Absent."""
    tree = part if isinstance(part, ast.Module) else ast.Module([part], [])
    try:
        exec(compile(tree, str(file), "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        if not (careful and isinstance(part, (ast.Import, ast.ImportFrom))):
            raise
        for name in _bound(part, file):
            module.__dict__.setdefault(name, Absent(f"fails on import: {type(error).__name__}: {error}"))


def _bound(part: ast.Import | ast.ImportFrom, file: Path) -> list[str]:
    """Return the names that an import statement in `file` binds; of `*`, the classes of the module beside it."""
    if part.names[0].name != "*":
        return [alias.asname or alias.name.split(".")[0] for alias in part.names]
    source = _file_of(file.parent, (part.module or "").rpartition(".")[2])
    tree = ast.parse(source.read_text(encoding="utf-8") if source else "")
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def _file_of(folder: Path, name: str) -> Path | None:
    """Return the file of the module or package `name`, with slashes, below `folder`; None where there is none."""
    options = (folder / name / "__init__.py", folder / f"{name}.py" if name else folder)
    return next((file for file in options if file.is_file()), None)


def _exists(full: str) -> bool:
    if full in sys.modules:  # mdistiller's import paths have no files of their own
        return True
    try:
        return importlib.util.find_spec(full) is not None
    except (ImportError, ValueError):
        return False


def package_root(path: Path) -> Path | None:
    """Return the folder at or below `path`, two levels at most, that has distillers/__init__.py; the highest one."""
    for pattern in ("", "*/", "*/*/"):
        if found := sorted(path.glob(f"{pattern}distillers/__init__.py")):
            return found[0].parents[1]
    return None
