"""Seeds as they are typed: 0 1 2, or 0-2, or 0,2,5-9."""

import re
from collections.abc import Sequence

from mdistiller.errors import UserError

MOST = 1000


def parse_seeds(words: Sequence[str]) -> list[int]:
    """Return the seeds that follow --seeds, in their order. Raises UserError where a word is none."""
    seeds: list[int] = []
    for word in " ".join(words).replace(",", " ").split():
        match = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", word)
        if not match:
            raise UserError(f"--seeds: {word} is no seed; write --seeds 0,1,2, or --seeds 0-2")
        low, high = int(match[1]), int(match[2] or match[1])
        if not low <= high < min(2**32, low + MOST):
            raise UserError(f"--seeds: {word}: seeds are below 2**32, the smaller one first, and {MOST:,} at most")
        seeds += range(low, high + 1)
    if not seeds:
        raise UserError("--seeds: no seed follows; write --seeds 0,1,2, or --seeds 0-2")
    if len(seeds) > MOST:
        raise UserError(f"--seeds: are {len(seeds):,}, and {MOST:,} at most; run the others afterwards")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: {next(s for s in seeds if seeds.count(s) > 1)} is given twice")
    return seeds
