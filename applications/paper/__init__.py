"""Make the page of the paper's tables and figures: its items, the stages they need, and what is measured."""
