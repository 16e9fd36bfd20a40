"""Frozen teachers and their features."""
