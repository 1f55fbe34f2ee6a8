"""What a store of rows costs: adding, committing, opening with its verification, reading.

python3 benchmarks/store.py [--rows 8100000] [--width 100] [--dtype float16] [--folder .] [--json FILE]

Fills a store in a new folder below `folder`, which is removed at the end: one epoch's 50,000 rows in adds of 64 with
one commit, as in lazy filling, then what is left of it in adds of 65,536 rows with a commit each. Random gathers are
the median of 2,000, behind as many that bring the file's pages in.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from mdistiller.bank.store import RowStore

EPOCH, BATCH, CHUNK = 50_000, 64, 1 << 16


def resident() -> int:
    """Megabytes of this process that are no file's pages."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8_100_000)
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    parser.add_argument("--folder", type=Path, default=Path("."))
    parser.add_argument("--json", type=Path, help="also write the figures there")
    a = parser.parse_args()
    generator = np.random.default_rng(0)
    values = generator.standard_normal((CHUNK, a.width)).astype(a.dtype)
    order, figures = generator.permutation(a.rows), {}
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        wanted = (Path(folder) / "store", {"benchmark": "store"}, a.rows, a.width, a.dtype)
        before = resident()
        with RowStore(*wanted) as store:
            epoch = order[:EPOCH]
            begin = time.perf_counter()
            for first in range(0, len(epoch), BATCH):
                rows = epoch[first : first + BATCH]
                store.add(rows, values[: len(rows)])
            figures["add_64_rows_us"] = (time.perf_counter() - begin) / (len(epoch) / BATCH) * 1e6
            begin = time.perf_counter()
            store.commit()
            figures["commit_of_an_epoch_ms"] = (time.perf_counter() - begin) * 1e3
            begin = time.perf_counter()
            for first in range(len(epoch), a.rows, CHUNK):
                rows = order[first : first + CHUNK]
                store.add(rows, values[: len(rows)])
                store.commit()
            figures["fill_MB_per_s"] = (a.rows - len(epoch)) * values[0].nbytes / (time.perf_counter() - begin) / 1e6
        size = (wanted[0] / "rows.bin").stat().st_size
        begin = time.perf_counter()
        store = RowStore(*wanted)
        seconds = time.perf_counter() - begin
        figures |= {"file_MB": size / 1e6, "open_s": seconds, "verify_MB_per_s": size / seconds / 1e6}
        assert store.complete
        for count in (64, 1024):
            times = []
            for _ in range(4000):
                rows = generator.integers(0, a.rows, count)
                begin = time.perf_counter()
                store.read(rows)
                times.append(time.perf_counter() - begin)
            figures[f"read_{count}_rows_us"] = statistics.median(times[2000:]) * 1e6
            figures[f"read_{count}_rows_us_first"] = statistics.median(times[:200]) * 1e6
        begin = time.perf_counter()
        total = sum(len(rows) for rows, _ in store.chunks())
        figures["chunks_MB_per_s"] = total * values[0].nbytes / (time.perf_counter() - begin) / 1e6
        figures["memory_MB"] = resident() - before
        store.close()
    machine = {"cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "numpy": np.__version__}
    for name, value in figures.items():
        print(f"{name:<28}{value:>12,.1f}")
    if a.json:
        a.json.write_text(json.dumps({"arguments": vars(a), **figures, **machine}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
