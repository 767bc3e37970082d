"""The paper's tables and figures: what each of them is, how it is measured, and the page that shows them."""
