"""The pages keep their promises: code blocks run as they stand, commands and files exist."""

import ast
import json
import re

import torch
import yaml
from helpers import ROOT, load_tool
from studies import write_run

from mdistiller.distillers import distiller_dict
from mdistiller.engine.cfg import load
from mdistiller.study.reference import signature


def test_what_the_pages_name_exists():
    pages = [ROOT / "README.md", ROOT / "download_ckpts" / "README.md", *(ROOT / "docs").glob("*.md")]
    missing = []
    for page in pages:
        text = page.read_text()
        named = [page.parent / link for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
        named += [ROOT / name for name in re.findall(r"--cfg (configs/\S+\.yaml)", text)]
        named += [ROOT / name for name in re.findall(r"(?:tools|benchmarks|tests)/[\w/]+\.py", text)]
        missing += [f"{page.name}: {path}" for path in named if not path.exists()]
        missing += [f"{page.name}: a figure"] * text.count("@@")
    assert not missing


def test_a_long_signature_is_python_as_a_short_one_is():
    def function(a: int = 1, *, an_option: str = "of some length", **rest: object) -> dict[str, int]:
        """A function."""

    long, short = signature("function_" * 8, function), signature("function", function)
    assert ast.dump(ast.parse(f"def {long}: pass")).replace("function_" * 8, "function") == ast.dump(
        ast.parse(f"def {short}: pass")
    )


def test_readme_method_loads(tmp_path):
    (text,) = re.findall(r"```python\n(.*?MyKD.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "my_kd.py").write_text(text)
    cfg = load(None, ["EXPERIMENT.PLUGINS", str(tmp_path / "my_kd.py"), "DISTILLER.TYPE", "MYKD", "MYKD.FACTOR", "2"])
    assert distiller_dict["MYKD"](torch.nn.Identity(), torch.nn.Identity(), cfg).kd_loss_weight == 1.8


def test_readme_yaml_is_a_valid_configuration(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    folder = tmp_path / "configs" / "cifar100" / "dtkd"
    folder.mkdir(parents=True)
    (folder / "x.yaml").write_text(text)
    (folder.parent / "_base.yaml").write_text((ROOT / "configs" / "cifar100" / "_base.yaml").read_text())
    cfg = load(folder / "x.yaml")
    assert yaml.safe_load(text)["DISTILLER"]["STUDENT"] == cfg.DISTILLER.STUDENT
    assert cfg.SOLVER.EPOCHS == 240


def test_the_page_on_speed_shows_what_was_measured():
    page = (ROOT / "docs" / "performance.md").read_text()
    modes = re.search(r"times the plain loop's images/s \| (.*) \| warm, bf16: of the floor", page)[1].split(" | ")
    for pair in json.loads((ROOT / "results" / "speed.json").read_text())["pairs"]:
        rows = {row["mode"]: row for row in pair["rows"]}
        cells = [f"{rows[mode]['times_plain']:.1f}" for mode in modes]
        cells.append(f"{100 * rows['warm, bf16']['share_of_floor']:.0f} %")
        assert f"| {pair['teacher']} -> {pair['student']} | {' | '.join(cells)} |\n" in page


def test_the_readme_s_table_is_what_compare_prints(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"ends with a table like this one.*?```\n(.*?)```", text, re.S)
    runs = []
    for line in table.splitlines()[4:]:
        name, method, teacher, student, last, *_ = line.split()
        keys = {"DISTILLER__TYPE": method, "DISTILLER__STUDENT": student}
        keys["DISTILLER__TEACHER"] = teacher.replace("-", "resnet20")
        runs.append(write_run(tmp_path, name, [*range(5), float(last)], **keys))
        rows = [json.loads(row) | {"best_epoch": 6} for row in (runs[-1] / "metrics.jsonl").read_text().splitlines()]
        (runs[-1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("sys.argv", ["compare", *map(str, runs)])
    load_tool("compare").main()
    assert capsys.readouterr().out == table
