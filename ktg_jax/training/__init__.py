"""Training a graph: its state, its step, its loop, on devices and from checkpoints."""
