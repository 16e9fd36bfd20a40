"""The order of a run's items, and the batches that are read in it."""
