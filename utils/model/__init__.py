"""The image and text towers of a CLIP: hooks, weights, checkpoints, preprocessing, vectors of texts."""
