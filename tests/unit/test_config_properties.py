"""The loader of configurations, given anything: a sound tree or lines that name what is wrong."""

import contextlib
import functools

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from mdistiller.config import leaves
from mdistiller.engine.cfg import CFG, load
from mdistiller.errors import ConfigError

KEYS = sorted(set(leaves(CFG)) | {key.rpartition(".")[0] for key in leaves(CFG)} - {""})
WORDS = [*map(str, leaves(CFG).values()), "_BASE_", "<<", "&a", "*a", "SOLVER", "LR", "4:00", "~", "null", "1e5"]
numbers = st.integers() | st.integers(-(10**500), 10**500) | st.floats()
scalars = st.none() | st.booleans() | numbers | st.dates() | st.binary(max_size=5) | st.text(max_size=20)
values = st.recursive(
    scalars | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
# what suits a key's type, so that many trees hold nothing wrong
fitting = st.sampled_from(sorted(leaves(CFG).items(), key=str))
names = st.sampled_from(KEYS) | st.text(max_size=10)
texts = st.text(max_size=60) | st.lists(st.sampled_from(WORDS + list("{}[]:,-\n '\"#!|>%")), max_size=25).map("".join)
bounded = hypothesis.settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def nested(pairs) -> dict:
    """{dotted key: value} as the tree that a YAML file would hold; what has no place in it is left out."""
    tree: dict = {}
    for key, value in pairs:
        *sections, last = key.split(".")
        with contextlib.suppress(AttributeError, TypeError):  # a value stands where a section would
            functools.reduce(lambda node, section: node.setdefault(section, {}), sections, tree)[last] = value
    return tree


def check(folder, path=None, opts=()) -> None:
    """`load` gives a frozen, typed tree that survives a dump; or a ConfigError of single lines."""
    try:
        cfg = load(path, opts)
    except ConfigError as error:
        cfg, lines = None, error.lines
    if cfg is None:
        assert lines and all(line.isprintable() and len(line) <= 1000 for line in lines)
        return
    assert cfg.is_frozen()
    kinds = [{key: type(value) for key, value in leaves(tree).items()} for tree in (cfg, CFG)]
    assert kinds[0] == kinds[1]
    (folder / "again.yaml").write_text(cfg.dump())
    assert load(folder / "again.yaml") == cfg


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


@bounded
@hypothesis.given(data=texts.map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=80))
def test_any_file(folder, data):
    (folder / "x.yaml").write_bytes(data)
    check(folder, folder / "x.yaml")


@bounded
@hypothesis.given(pairs=st.lists(st.tuples(names, values) | fitting, max_size=4))
def test_any_tree(folder, pairs):
    (folder / "x.yaml").write_text(yaml.safe_dump(nested(pairs)))
    check(folder, folder / "x.yaml")


@bounded
@hypothesis.given(pairs=st.lists(st.tuples(names, values.map(str) | values) | fitting, max_size=3), odd=st.booleans())
def test_any_pairs(folder, pairs, odd):
    words = [word for pair in pairs for word in pair]
    check(folder, None, words[: len(words) - odd])
