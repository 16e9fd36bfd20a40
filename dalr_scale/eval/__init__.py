"""Scores a sentence encoder."""
