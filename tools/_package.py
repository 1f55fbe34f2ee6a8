"""Imported first by every tool: finds the package beside this folder, installed or not, and says what it lacks."""

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "results" / "published.json"
sys.path.insert(1, str(ROOT))  # before one of another checkout that is installed
missing = [name for name in ("torch", "torchvision", "yacs", "numpy", "tqdm") if importlib.util.find_spec(name) is None]
if missing:
    print(f"error: needs {', '.join(missing)}; pip install -e {ROOT}", file=sys.stderr)
    sys.exit(2)


def parser(text: str, plugins: str = "") -> argparse.ArgumentParser:
    """Return a parser whose --help is the tool's `text` as it stands; with --plugins where there is a help for it."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if plugins:
        made.add_argument("--plugins", nargs="+", default=[], metavar="FILE", help=plugins)
    return made
