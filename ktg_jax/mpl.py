"""matplotlib, imported whatever backend the environment asks for.

A notebook names in `MPLBACKEND` a backend that its own Python has, and passes that on to the
programs it starts. Where it is not installed matplotlib refuses to be imported, though pictures
that only become files need no backend. All modules of ours take matplotlib from here.
"""

import os
import sys
from contextlib import suppress

_chosen = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, FancyArrowPatch, PathPatch, Rectangle
    from matplotlib.path import Path as Curve
    from matplotlib.textpath import TextPath
    from matplotlib.ticker import MaxNLocator

    if _chosen:
        with suppress(ValueError):  # the user's own figures, where it is a backend
            matplotlib.rcParams["backend"] = _chosen
finally:
    if _chosen is not None:
        os.environ["MPLBACKEND"] = _chosen

__all__ = [
    "Axes",
    "Circle",
    "Curve",
    "FancyArrowPatch",
    "Figure",
    "FontProperties",
    "Line2D",
    "LineCollection",
    "MaxNLocator",
    "PathPatch",
    "Rectangle",
    "TextPath",
    "matplotlib",
]
