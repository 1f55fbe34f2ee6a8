"""mdistiller's name for `base`: method files written for it import from here."""

from mdistiller.distillers.base import *  # noqa: F403
