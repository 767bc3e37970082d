"""The model wing has the towers of a CLIP: hooks, weights, checkpoints, preprocessing, text vectors."""
