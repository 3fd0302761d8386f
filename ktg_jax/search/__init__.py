"""The search for the graph that is best for its target: the space, how it is drawn from, pruning.

Only `samplers` and `pruners` need Optuna (extra: search), and nothing here imports them.
"""

from ktg_jax.search.space import SearchSpace

__all__ = ["SearchSpace"]
