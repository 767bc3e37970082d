"""What stages read: images, segmentation sets, text sets."""
