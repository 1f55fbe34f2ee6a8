"""The loader of configurations, given anything: a sound tree or lines that name what is wrong."""

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from mdistiller.config import get, leaves
from mdistiller.engine.cfg import CFG, load
from mdistiller.errors import ConfigError

KEYS = sorted(set(leaves(CFG)) | {key.rpartition(".")[0] for key in leaves(CFG)} - {""})
WORDS = [*map(str, leaves(CFG).values()), "_BASE_", "<<", "&a", "*a", "SOLVER", "LR", "4:00", "~", "null", "1e5"]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**500), 10**500)
    | st.floats()
    | st.dates()
    | st.binary(max_size=5)
    | st.text(max_size=20)
    | st.sampled_from(WORDS)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
# what suits a key's type, so that many trees hold nothing wrong
fitting = st.sampled_from(sorted(leaves(CFG).items(), key=str))
names = st.sampled_from(KEYS) | st.text(max_size=10)
texts = st.text(max_size=60) | st.lists(st.sampled_from(WORDS + list("{}[]:,-\n '\"#!|>%")), max_size=25).map("".join)
bounded = hypothesis.settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def nested(pairs) -> dict:
    """{dotted key: value} as the tree that a YAML file would hold."""
    tree: dict = {}
    for key, value in pairs:
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                break
        else:
            node[last] = value
    return tree


def check(folder, path=None, opts=()) -> None:
    """`load` gives a frozen, typed tree that survives a dump; or a ConfigError of single lines."""
    try:
        cfg = load(path, opts)
    except ConfigError as error:
        lines = error.lines
    else:
        assert cfg.is_frozen()
        assert leaves(cfg).keys() == leaves(CFG).keys()
        wrong = [key for key, value in leaves(cfg).items() if type(value) is not type(get(CFG, key))]
        assert not wrong
        (folder / "again.yaml").write_text(cfg.dump())
        assert load(folder / "again.yaml") == cfg
        return
    assert lines and all(line.isprintable() and len(line) <= 1000 for line in lines)


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
