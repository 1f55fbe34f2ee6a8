from mdistiller.study.tables import compared, plain


def table(folders):
    """Return the runs side by side, for tools/compare.py."""
    return plain(compared(folders))
