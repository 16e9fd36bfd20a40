"""What a run writes into its directory: checkpoints, state, status, lock."""
