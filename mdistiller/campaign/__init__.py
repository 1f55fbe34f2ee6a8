"""Plans of many runs: what they hold, what of it is done, running the rest, and the tables that come of it."""
