"""Experiments: command-line modules that train and evaluate knowledge transfer graphs."""
