"""Write a run's student in forms to deploy, and measure each beside the teacher.

python3 tools/export.py RUN/student_best --to onnx torch openvino
python3 tools/export.py RUN/student_best --to onnx int8 --out deploy

Into the folder go the files, the weights as safetensors, export.json and a
model card. torch is torch.export's .pt2. onnx and int8 need
pip install onnx onnxscript onnxruntime, openvino needs pip install openvino.
A detector is written as onnx alone.
"""

from pathlib import Path

import _package

from mdistiller.errors import run_command

FORMS = ("torch", "onnx", "openvino", "int8")


def main() -> None:
    parser = _package.parser(__doc__, plugins="plug-ins that bring the model or the data")
    parser.add_argument("checkpoint", type=Path, help="RUN/student_best, RUN/student_latest, RUN/student_ema")
    parser.add_argument(
        "--to",
        nargs="+",
        choices=FORMS,
        default=["torch"],
        metavar="FORM",
        help=f"of {', '.join(FORMS)}; default: torch",
    )
    parser.add_argument("--int8", action="store_true", help="the form int8 besides, as --to FORM int8")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/export")
    parser.add_argument("--root", default="", help="where the run's data are now")
    a = parser.parse_args()
    from mdistiller.study.export import export  # torch takes seconds to import, and --help needs none
    from mdistiller.study.tables import text_table
    from mdistiller.terminal import columns, say

    forms = dict.fromkeys([*a.to, *(["int8"] if a.int8 else [])])
    found = export(a.checkpoint, [*forms], a.out, a.plugins, a.root)
    say("\n" + text_table(found.table, columns()))
    say(f"\nwritten to {found.folder}: README.md is the model card")


if __name__ == "__main__":
    run_command(main)
