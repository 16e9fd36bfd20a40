"""The commands of ``dalr-scale``, one file each: arguments in, one call."""
