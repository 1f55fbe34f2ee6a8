"""The report's page as text; tests/runs/test_report_browser.py has it in a browser."""

import html
import re

from mdistiller.engine.cfg import load
from mdistiller.study.charts import Chart, Panel, Series
from mdistiller.study.page import columns_and_rows, report_page
from mdistiller.study.runs import Group, Run
from mdistiller.study.statistics import mean_and_std
from mdistiller.study.tables import Table

NASTY = "a $x^ <script>alert(1)</script> </style> \"'& \x07 ${{%s}} {{ 1 + 1 }} %{y} <b>|_,"


def test_names_of_any_kind_are_escaped_and_nothing_is_fetched(tmp_path):
    row = {"epoch": 1, "test_acc": 1.0, "best_acc": 1.0}
    group = Group([Run(tmp_path, load(None, ["DISTILLER.STUDENT", "resnet8"]), [row])], extra=NASTY)
    panel = Panel(NASTY, NASTY, NASTY, [Series(NASTY, 0, [1], [2], text=[NASTY]), Series("b", None, [1], [2])])
    chart = Chart("chart", NASTY, NASTY, NASTY, [panel])
    table = Table(NASTY, NASTY, NASTY, [NASTY], [[NASTY]], [0])
    text = report_page([group], [table], [chart], [NASTY], "today")
    assert "alert(1)</script>" not in text and "\x07" not in text
    own = re.sub(r"(?s)<style>.*?</style>|<script[ >].*?</script>", "", text)
    assert own.count(html.escape(NASTY.replace("\x07", " ")).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")) > 5
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", own)
    assert "default-src 'none'" in own


def test_what_a_cell_shows_and_is_sorted_by():
    rows = [["a", 1.0, None, "x"], ["b", mean_and_std([2.0, 4.0]), "3 of 5", None]]
    columns, found = columns_and_rows(Table("t", "", "", ["run", "n", "−", "text"], rows, [4, 7]))
    assert columns == [("run", "wide"), ("n", "number"), ("−", "text"), ("text", "text")]
    assert found == [
        (4, [("a", "a"), ("1.00", 1.0), ("–", ""), ("x", "x")]),
        (7, [("b", "b"), ("3.00 ± 1.41", 3.0), ("3 of 5", "3 of 5"), ("–", "")]),
    ]
