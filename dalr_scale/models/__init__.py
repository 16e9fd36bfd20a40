"""Encoders, heads and frozen teachers; nothing here knows how a batch is spread over ranks."""
