"""Our figures beside the reference's, for every method that the reference figures hold.

python3 benchmarks/golden.py

Needs ../shared/reference; tests/test_contract.py asserts the same to 1e-3.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from test_contract import GOLDEN, golden_figures


def main() -> None:
    names = ("loss", "reference", "gradient", "reference", "extra")
    print(f"{'teacher -> student':<26}{'method':<10}{'epoch':>5}{''.join(f'{name:>12}' for name in names)}{'worst':>9}")
    for key in sorted(GOLDEN):
        if key.startswith("distiller/"):
            _, teacher, student, method, epoch = key.split("/")
            ours, reference = golden_figures(key), GOLDEN[key]
            worst = max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, reference, strict=True) if b)
            print(f"{f'{teacher} -> {student}':<26}{method:<10}{epoch:>5}{ours[0]:>12.5f}{reference[0]:>12.5f}"
                  f"{ours[1]:>12.5f}{reference[1]:>12.5f}{ours[2]:>12,}{worst:>9.0e}")  # fmt: skip


if __name__ == "__main__":
    main()
