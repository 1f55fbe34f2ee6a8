"""Fetch mdistiller's released teachers, or CIFAR's official binary version:
resumed, verified, unpacked.

python3 tools/download.py teachers                  into ./download_ckpts
python3 tools/download.py cifar100                  into ./data
python3 tools/download.py cifar10 --to /data --from cifar-10-binary.tar.gz
"""

import sys

import _package

from mdistiller.download import ARCHIVES, fetch
from mdistiller.errors import run_command


def main() -> None:
    parser = _package.parser(__doc__)
    parser.add_argument("what", choices=ARCHIVES)
    parser.add_argument("--to", metavar="FOLDER", help="where to unpack it")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--mirror", metavar="URL", default="", help="another server's folder, or the archive's full URL"
    )
    source.add_argument("--from", metavar="FILE", dest="file", help="the archive, fetched elsewhere; it is left there")
    a = parser.parse_args()
    try:
        fetch(a.what, a.to, a.mirror, a.file)
    except KeyboardInterrupt:
        print("interrupted; what has come is kept, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    run_command(main)
