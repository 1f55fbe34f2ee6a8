from mdistiller.study.superclasses import *  # noqa: F403
