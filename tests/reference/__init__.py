"""A second trainer, only for tests: plain PyTorch, one process, the whole batch, dense float64.

It is written from the equations of the method alone and shares no code with ``dalr_scale`` beyond
reading the same shards, features and configuration, so that a fault of the trainer is not repeated
here. What it takes from the run under test: the permutation of the items (``epoch_order``), the
initial weights, and the random shift of the unmatched images.
"""
