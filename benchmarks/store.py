"""What a bank's rows cost on disk: adding, committing, opening, reading from many files and from merged ones.

python3 benchmarks/store.py [--rows 8100000] [--width 100] [--dtype float16] [--commits 60] [--folder .] [--json FILE]

Fills a new folder below `folder`, which is removed at the end, by so many commits of rows that are added 1,024
together. Random look-ups are the median of 2,000, behind as many that bring the files' pages in.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mdistiller.bank import segments
from mdistiller.bank.segments import Segments

TOGETHER = 1024


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def look_ups(store: Segments, count: int) -> float:
    """Return the median microseconds of reading `count` random rows."""
    every = [torch.randint(0, store.rows, (count,)) for _ in range(4000)]
    return 1e6 * statistics.median([seconds(lambda rows=rows: store.read(rows)) for rows in every][2000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8_100_000)
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    parser.add_argument("--commits", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("."))
    parser.add_argument("--json", type=Path, help="also write the figures there")
    a = parser.parse_args()
    values = torch.randn(TOGETHER, a.width).to(getattr(torch, a.dtype))
    figures = {}
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        wanted = (Path(folder), {"benchmark": "store"}, a.rows, a.width, values.dtype)
        segments.MOST_SMALL, limit = a.commits, segments.MOST_SMALL
        store, adding, committing = Segments(*wanted), 0.0, 0.0
        for part in torch.randperm(a.rows).chunk(a.commits):
            for rows in part.split(TOGETHER):
                adding += seconds(lambda rows=rows: store.add(rows, values[: len(rows)]))
            committing += seconds(store.commit)
        figures["add_1024_rows_us"] = 1e6 * adding * TOGETHER / a.rows
        figures["commit_ms"] = 1e3 * committing / a.commits
        figures["files_MB"] = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        figures["open_s"] = seconds(lambda: Segments(*wanted))
        store = Segments(*wanted)
        figures |= {f"read_{count}_rows_us": look_ups(store, count) for count in (64, 1024)}
        segments.MOST_SMALL = 0
        figures["open_and_merge_s"] = seconds(lambda: Segments(*wanted))
        segments.MOST_SMALL = limit
        store = Segments(*wanted)
        figures |= {f"read_{count}_merged_rows_us": look_ups(store, count) for count in (64, 1024)}
    machine = {"cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}
    for name, value in figures.items():
        print(f"{name:<28}{value:>12,.1f}")
    if a.json:
        a.json.write_text(json.dumps({"arguments": vars(a), **figures, **machine}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
