"""Runs side by side: last and best accuracy, read from their folders."""

from pathlib import Path

from mdistiller.analysis.runs import read_run

HEAD = ("run", "method", "teacher", "student", "data", "seed", "epochs", "last", "best", "at epoch")


def row_of(folder: Path) -> tuple[str, ...]:
    """The run's cells, in the order of HEAD. Raises UserError where the folder holds no finished epoch."""
    run = read_run(folder)
    cfg, last = run.cfg, run.rows[-1]
    epochs = f"{last['epoch']}/{cfg.SOLVER.EPOCHS}"
    teacher = "-" if cfg.DISTILLER.TYPE == "NONE" else cfg.DISTILLER.TEACHER
    names = (folder.name, cfg.DISTILLER.TYPE, teacher, cfg.DISTILLER.STUDENT, cfg.DATASET.TYPE, str(cfg.SEED), epochs)
    return *names, f"{last['test_acc']:.2f}", f"{last['best_acc']:.2f}", str(last.get("best_epoch", "-"))


def table(folders: list[Path]) -> str:
    """One line a run, columns aligned, figures to the right."""
    rows = [HEAD, *(row_of(folder) for folder in folders)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    right = HEAD.index("seed")
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i >= right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
