"""The first minutes on a GPU: what works there, what does not, how fast it is; ten minutes at most, without a network.

python3 benchmarks/first_light.py [--out output/first_light] [--minutes 10] [--device auto] [--only PART ...]

Each part runs in a process of its own, with a limit of its own, so that neither a broken CUDA context nor a hang costs
more than that part. After every part OUT/first_light.json and OUT/first_light.md are written anew; OUT/PART.log has
what a part printed. On a CPU everything is smaller, and what needs CUDA is left out: that shows that the command works.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_parts import PARTS, Part

from mdistiller.device import resolve_device
from mdistiller.engine.cfg import load
from mdistiller.errors import UserError, run_command
from mdistiller.runs.environment import environment
from mdistiller.runs.folder import check_writable


def machine(device: str, file: Path) -> None:
    """Write what `environment` says of the machine, its device included."""
    found = resolve_device(device)
    known = environment(found) | {"kind": str(found)}
    if found.type == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            known["driver, memory"] = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
    file.write_text(json.dumps(known))


def apart_from_this(work: Callable[[], None], log: Path, seconds: float) -> str:
    """Run `work` in a forked child, which has all imports and no CUDA yet. Return what went wrong, empty if nothing."""

    def child() -> None:
        with open(log, "w", buffering=1) as out:
            for stream in (1, 2):
                os.dup2(out.fileno(), stream)
            os.setsid()  # with what it starts, it can be ended
            work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    try:
        process.join(seconds)
        late = process.exitcode is None
    finally:  # also at Ctrl-C, which the child does not see
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    if late:
        return f"out of time after {seconds:.0f} s"
    last = (log.read_text().strip().splitlines() or [""])[-1]
    return f"exit status {process.exitcode}: {last}"[:200] if process.exitcode else ""


def shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "/")


def table(rows: dict[str, dict]) -> list[str]:
    heads = sorted({head: None for cells in rows.values() for head in cells}, key=lambda head: head == "ok")  # last
    lines = [["", *heads], ["---"] * (len(heads) + 1)]
    lines += [[name, *(shown(cells.get(head, "")) for head in heads)] for name, cells in rows.items()]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def page(found: dict) -> str:
    """Return the Markdown page of all that is known so far."""
    machine, parts = found["machine"], found["parts"]
    command = f"python3 benchmarks/first_light.py {found['command']}".strip()
    lines = ["# First light", "", f"`{command}`", ""]
    if not str(machine.get("kind")).startswith("cuda"):
        lines += ["**Not on a GPU**: this shows that the command works, and nothing about CUDA.", ""]
    known = ("started", "device", "driver, memory", "capability", "torch", "cuda", "cudnn", "python", "platform")
    lines += [f"- {key}: {machine[key]}" for key in (*known, "threads") if machine.get(key)]
    if git := machine.get("git"):
        lines.append(f"- commit: {git['commit'][:12]}{'' if git['clean'] else ', with changes'}")
    bad = [name for name, part in parts.items() if part["state"].startswith("failed")]
    lines += ["", f"**{len(bad)} of {len(parts)} parts failed: {', '.join(bad)}**" if bad else "No part failed.", ""]
    lines += table({name: {key: part[key] for key in ("state", "s", "first line")} for name, part in parts.items()})
    for name, part in parts.items():
        if part["rows"]:
            lines += [f"## {name}", "", " ".join(PARTS[name][0].__doc__.split()), "", *table(part["rows"])]
    return "\n".join(lines)


def run_part(name: str, device: torch.device, out: Path, seconds: float) -> dict:
    """Run a part. Return its rows, its state, the seconds that it took and the first line of what went wrong."""
    begin, file = time.monotonic(), out / f"{name}.json"
    file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = PARTS[name][0]
        wrong = apart_from_this(lambda: work(Part(device, Path(folder), file)), out / f"{name}.log", seconds)
    rows = json.loads(file.read_text()) if file.exists() else {}
    file.unlink(missing_ok=True)
    bad = [f"{key}: {cells.get('error', 'not as it should be')}" for key, cells in rows.items() if not cells.get("ok")]
    state = "failed" if bad or wrong else "done"
    state += f", {len(bad)} of {len(rows)} rows" if bad else ""
    first = (([wrong] if wrong else []) + bad + [""])[0]
    return {"state": state, "s": round(time.monotonic() - begin, 1), "first line": first, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/first_light"), metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all; each part's own limit grows with it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    a = parser.parse_args()
    end = time.monotonic() + 60 * a.minutes
    check_writable(a.out / "first_light.json", "--out")
    a.out = a.out.absolute()
    load()  # fills the registries
    for slow in ("sklearn.datasets", "torch._dynamo"):  # imported once, not in each child
        importlib.import_module(slow)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "machine.json"
        wrong = apart_from_this(lambda: machine(a.device, file), Path(folder) / "log", 60)
        if wrong:
            raise UserError(f"--device {a.device}: {wrong.rpartition('Error: ')[2]}")
        found = {"command": " ".join(sys.argv[1:]), "machine": json.loads(file.read_text()), "parts": {}}
    a.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(found["machine"]["kind"])
    print(f"first light on {found['machine']['device']}, torch {torch.__version__}; {a.minutes:g} minutes at most")
    for number, name in enumerate(a.only, 1):
        limit = PARTS[name][1 if device.type == "cuda" else 2] * a.minutes / 10
        left, why = end - time.monotonic(), "no time left" if limit else "needs CUDA"
        result = {"state": "left out", "s": 0.0, "first line": why, "rows": {}}
        if limit and left > 1:
            result = run_part(name, device, a.out, min(limit, left))
        found["parts"][name] = result
        (a.out / "first_light.json").write_text(json.dumps(found, indent=1) + "\n")
        (a.out / "first_light.md").write_text(page(found))
        said = f"{number:>2}/{len(a.only)}  {name:<15}{result['s']:>6.1f} s  {result['state']}"
        print(": ".join(filter(None, [said, result["first line"]])), flush=True)
    print(f"written: {a.out / 'first_light.md'}, {a.out / 'first_light.json'}")


if __name__ == "__main__":
    run_command(main)
