"""Measures the library against PyTorch, side by side: see `python -m benchmarks.step --help`."""

import experiments  # noqa: F401  (before all else: Ctrl-C is one line from now on)
