"""mdistiller's name for `features` and `losses`: method files written for it import from here."""

from mdistiller.distillers.features import *  # noqa: F403
from mdistiller.distillers.losses import *  # noqa: F403
