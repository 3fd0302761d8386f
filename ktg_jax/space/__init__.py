"""The graphs that a search chooses from: what they may be, how many there are, and drawing them."""
