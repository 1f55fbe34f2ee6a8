"""YAML files and the _BASE_ files that they inherit from, as plain trees."""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path

import yaml

from mdistiller import files
from mdistiller.config.keys import show
from mdistiller.errors import UserError


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset, without aliases, which may multiply, and without a key given twice, of which PyYAML would
    silently keep the last.
    """

    def compose_node(self, parent: yaml.Node, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            reason = f"it uses the alias *{event.anchor}; write its value out, or put what is shared into a _BASE_ file"
            raise yaml.composer.ComposerError(None, None, reason, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {show(key)} is no text; quote it", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.Node) -> int | str:
        """Return the whole number; what YAML reads in base 60, where 4:00 is 240, stays text."""
        return node.value if ":" in node.value else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.Node) -> float | str:
        return node.value if ":" in node.value else super().construct_yaml_float(node)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)
_StrictLoader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)  # a date is text


@functools.lru_cache(64)  # a plan has the same files for all of its runs
def _parse(text: str) -> object:
    return yaml.load(text, Loader=_StrictLoader)


def read_yaml(path: Path, problems: list[str], seen: tuple[Path, ...] = ()) -> dict:
    """Return the tree of `path` over those of its _BASE_ files. `seen`: the files that led here."""
    wanted = f"an existing YAML file as _BASE_ of {seen[-1]}" if seen else "an existing YAML file with --cfg"
    try:
        with files.open_regular(path, wanted) as file:
            data = file.read()
        if path.resolve() in seen:
            raise UserError(f"{path}: _BASE_ leads back to this file; remove one of the _BASE_ lines")
        tree = copy.deepcopy(_parse(data.decode()))
    except UserError as error:
        problems += error.lines
        return {}
    except UnicodeDecodeError:
        problems.append(f"{path}: is not UTF-8 text; pass {wanted}")
        return {}
    except Exception as error:  # PyYAML lets through what int(), bool and recursion raise
        reason = " ".join(str(error).split())
        if mark := getattr(error, "problem_mark", None):
            place = f"line {mark.line + 1}, column {mark.column + 1}"
            reason = f"{place}: {', '.join(filter(None, (error.context, error.problem)))}"
        problems.append(f"{path}: cannot be read, for it is not valid YAML: {reason}")
        return {}
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        problems.append(f"{path}: holds a {type(tree).__name__}; a configuration is a mapping of sections to keys")
        return {}
    bases = tree.pop("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        problems.append(f"{path}: _BASE_ must be a path or a list of paths")
        return tree
    merged: dict = {}
    for base in bases:
        merged = _overlay(merged, read_yaml(path.parent / base, problems, (*seen, path.resolve())))
    return _overlay(merged, tree)


def _overlay(base: Mapping, top: Mapping) -> dict:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged
