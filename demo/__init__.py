"""The embedded world: drawn pictures of known truth, a small CLIP trained on them, and the whole method on
both.
"""
