"""Draw the embedded world of known truth, train a small CLIP on it, and run the whole method on both."""
