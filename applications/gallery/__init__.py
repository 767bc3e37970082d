"""The gallery of neurons: what a pass over the images collects, the files of the page, and the page
itself.
"""
