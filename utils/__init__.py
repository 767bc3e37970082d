"""The second-order lens: everything the stage scripts share."""
