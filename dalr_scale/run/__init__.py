"""The directory of a run: checkpoints, state, status, failures, lock. Nothing here imports torch."""
