"""Images on the device: where they come from, and how batches are made of them."""
