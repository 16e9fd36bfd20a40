"""Shards on disk: samples, their index, stored features and token ids, remote copies."""
