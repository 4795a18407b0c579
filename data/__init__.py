"""What goes in: sources, decoding, augmentations, masks and collators."""
