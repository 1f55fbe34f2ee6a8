"""What a run leaves on disk: its folder, checkpoints, records, and how a signal ends it."""
