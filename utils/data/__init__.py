"""The data wing reads what stages look at: images, segmentation sets, text sets."""
