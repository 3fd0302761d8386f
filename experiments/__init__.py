"""Experiments: command-line modules that train and evaluate knowledge transfer graphs."""

import sys

if sys.argv[:1] == ["-m"]:  # as Python names a program while it imports the package that it is in
    from .runs import signals

    signals.begin_process()
