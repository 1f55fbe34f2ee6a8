"""What an adapter says where the library is missing that it is for."""

import importlib
import sys

from helpers import refused


def test_where_trl_is_missing_one_line_says_what_to_install(monkeypatch):
    for name in ("trl", "trl.experimental", "trl.experimental.gkd"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "mdistiller.integrations.trl", raising=False)
    with refused(r'needs trl 1.16 or newer \(.*\): pip install "mdistiller\[trl\]"'):
        importlib.import_module("mdistiller.integrations.trl")
