"""Measures the library against PyTorch, side by side: see `python -m benchmarks.step --help`."""
