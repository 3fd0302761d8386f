"""The HTML report of a search: what is counted, the figures, and the page."""
