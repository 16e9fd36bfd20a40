"""The loss terms of DALR."""
