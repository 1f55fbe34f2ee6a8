from mdistiller.study.runs import *  # noqa: F403
