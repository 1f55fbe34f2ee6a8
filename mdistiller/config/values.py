"""Values as they are typed: in a YAML file, on the command line, in Python."""

import ast
import re
import warnings
from collections.abc import Mapping


def decode(text: object) -> object:
    """Return the value typed as `text`: 5e-4, [1, 2], [a.py, b.py]. Files need it too: YAML reads 5e-4 as text."""
    if not isinstance(text, str):
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a text may look like odd Python
            value = ast.literal_eval(text.strip())
        return value if _is_plain(value) else text
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        if words := re.fullmatch(r"\[([^\[\]'\"]+)\]", text.strip()):
            return [decode(word.strip()) for word in words[1].split(",")]
        return {"true": True, "false": False}.get(text.strip().lower(), text)


def decode_tree(value: object) -> object:
    """Return `value` with every text in its mappings decoded."""
    return {k: decode_tree(v) for k, v in value.items()} if isinstance(value, Mapping) else decode(value)


def _is_plain(value: object) -> bool:
    """Return whether YAML can hold `value`: no set, no bytes, no complex number."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def kind_of(default: object) -> str:
    """Return what a value in the place of `default` must be, in words."""
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    return names.get(type(default), "a list")


def coerce(value: object, default: object) -> object:
    """Return `value` as the type of `default`: int serves for float, list for tuple. Raises TypeError otherwise."""
    if isinstance(default, str):
        if isinstance(value, str):
            return value
        raise TypeError
    value = decode(value)
    if isinstance(default, (list, tuple)):
        if default in ([], ()) and isinstance(value, str):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise TypeError
        if not default:  # an empty default says nothing about what the list holds
            return type(default)(value)
        return type(default)(coerce(item, default[0]) for item in value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise TypeError
    return value
