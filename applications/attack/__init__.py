"""Semantic adversarial images (section 5.1 of the paper)."""
