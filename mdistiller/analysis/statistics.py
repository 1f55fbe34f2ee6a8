from mdistiller.study.statistics import *  # noqa: F403
