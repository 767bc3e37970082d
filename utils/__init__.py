"""The second-order lens is what the stage scripts share: the method, flat, and its wings."""
