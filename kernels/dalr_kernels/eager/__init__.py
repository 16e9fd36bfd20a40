"""The losses in plain torch: memory linear in the batch, on any device."""
