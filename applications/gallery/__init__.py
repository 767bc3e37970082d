"""Make the gallery of neurons: look at images, read results, write the page."""
