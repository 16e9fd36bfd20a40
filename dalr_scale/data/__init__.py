"""Turns raw data into shards, and shards into an endless, restartable stream of equal batches."""
