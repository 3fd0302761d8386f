"""Files, tensors and pytrees: what everything else reads and writes through."""
