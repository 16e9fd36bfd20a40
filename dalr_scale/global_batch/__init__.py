"""One optimizer step over a global batch, whatever chunks and ranks it is spread over."""
