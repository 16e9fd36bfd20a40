"""DeepSpeed and DDP behind one protocol."""
