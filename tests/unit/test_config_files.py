"""What a YAML file may hold: plain keys and values, each once, within limits; anything else is named in one line."""

import os

import pytest

from mdistiller.config import leaves
from mdistiller.engine.cfg import CFG, load
from mdistiller.errors import ConfigError


def problems(path):
    """The lines that refuse the file, which are few, short and printable."""
    with pytest.raises(ConfigError) as caught:
        load(path)
    lines = caught.value.lines
    assert 0 < len(lines) <= 21
    assert all(line.isprintable() and len(line) <= 1000 for line in lines)
    return lines


BAD = {
    "tab": "SOLVER:\n\tLR: 1",
    "unclosed": "SOLVER: {LR: 1",
    "a key twice": "SOLVER: {LR: 1, LR: 2}",
    "a Python object": "!!python/object/apply:os.mkdir ['bomb']",
    "an unknown tag": "SOLVER: !mine {LR: 1}",
    "an alias": "SEED: &n 4\nCRD: {FEAT: {DIM: *n}}",
    "a merge of an alias": "DKD: &d {T: 3.0}\nDTKD: {<<: *d, ALPHA: 5.0}",
    "an alias of nothing": "SOLVER: *gone",
    "a merge of text": "SOLVER: {<<: text}",
    "a deep list": "[" * 10**5,
    "a deep map": "{a: " * 10**4,
    "too long": "# " + "x" * 2**20,
    "Latin 1": b"EXPERIMENT: {TAG: \xe9}",
    "a NUL": b"SOLVER: {LR: 1}\0",
    "a control character": "EXPERIMENT: {TAG: a\x07b}",
    "two documents": "SEED: 1\n---\nSEED: 2",
    "a number as key": "1: 2",
    "a list as key": "? [a, b]\n: 2",
    "a list": "- SOLVER",
    "bytes": "EXPERIMENT: {TAG: !!binary aGVsbG8=}",
    "5,000 digits": f"SEED: {'1' * 5000}",
    "another YAML": "%YAML 9.9\n---\nSEED: 1",
    "a _BASE_ that is a folder": "_BASE_: .",
    "a _BASE_ that is a device": "_BASE_: /dev/zero",
    "a _BASE_ that is missing": "_BASE_: gone.yaml",
    "a _BASE_ that is a number": "_BASE_: 5",
    "a _BASE_ that is a map": "_BASE_: {a: b}",
    "a _BASE_ of itself": "_BASE_: ./././x.yaml",
    "a _BASE_ with a NUL": '_BASE_: "a\\0b"',
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_bytes(BAD[case].encode() if isinstance(BAD[case], str) else BAD[case])
    lines = problems("x.yaml")
    assert any("x.yaml" in line or "TAG" in line for line in lines), lines
    assert os.listdir(tmp_path) == ["x.yaml"]


def test_aliases_say_what_to_write_instead(tmp_path):
    (tmp_path / "x.yaml").write_text(BAD["an alias"])
    (line,) = problems(tmp_path / "x.yaml")
    assert "*n" in line and "write its value out" in line


def test_many_mistakes_are_few_lines(tmp_path):
    (tmp_path / "x.yaml").write_text("\n".join(f"key{i}: 1" for i in range(900)) + f"\n? {'k' * 100_000}\n: 1")
    assert problems(tmp_path / "x.yaml")[-1] == "and 881 more of this kind"


def test_a_date_is_the_text_that_it_is(tmp_path):
    (tmp_path / "x.yaml").write_text("EXPERIMENT: {TAG: 2024-01-01, NAME: 4:00}")
    assert load(tmp_path / "x.yaml").EXPERIMENT.TAG == "2024-01-01"
    assert load(tmp_path / "x.yaml").EXPERIMENT.NAME == "4:00"


VALUES = [
    ("SEED", "2024-01-01"),
    ("SEED", "0x" + "f" * 5000),
    ("SOLVER.LR_DECAY_STAGES", f"[0x{'f' * 5000}]"),
    ("SOLVER.LR_DECAY_STAGES", f"[{10**40}]"),
    ("SOLVER.LR_DECAY_STAGES", "[{a: 1}]"),
    ("SOLVER.LR", "1.0e+60"),
    ("SOLVER.LR", ".nan"),
    ("SOLVER", "[1, 2]"),
    ("SOLVER.BATCH_SIZE", str(10**30)),
    ("DATASET.TEST", "yes please"),
    ("DATASET.TEST.BATCH_SIZE", str(2**63 - 1)),
    ("DATASET.ROOT", r'"a\0b"'),
    ("DATASET.ROOT", "~nosuchuser/x"),
    ("CRD.NCE.K", str(10**9)),
    ("FITNET.INPUT_SIZE", "[100000, 100000]"),
    ("MLKD.TEMPERATURES", "[1.0, .nan]"),
    ("MLKD.TEMPERATURES", "[]"),
    ("EXPERIMENT.NAME", r'"\uD800"'),
    ("EXPERIMENT.NAME", "é" * 200),
    ("EXPERIMENT.TAG", r'"\e[31mred"'),
    ("EXPERIMENT.PROJECT", "a/../../x"),
    ("EXPERIMENT.PROJECT", "a" * 300),
    ("EXPERIMENT.PLUGINS", "[[a]]"),
    ("LOG.PREFIX", "a/" * 2100),
    ("DISTILLER.TYPE", "K" * 100_000),
]


def nested(key, value):
    *sections, last = key.split(".")
    return "".join(f"{' ' * i}{name}:\n" for i, name in enumerate(sections)) + f"{' ' * len(sections)}{last}: {value}\n"


def test_a_bad_value_is_named_by_its_key(tmp_path):
    path = tmp_path / "x.yaml"
    for key, value in VALUES + [(key, "null") for key in leaves(CFG)]:
        path.write_text(nested(key, value))
        lines = problems(path)
        assert any(key in line for line in lines), (key, value[:80], lines)
