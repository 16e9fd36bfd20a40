"""Distributed large-batch training of DALR multimodal sentence embeddings."""

__version__ = "0.1.0"
