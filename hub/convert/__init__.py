"""Convert checkpoints of the papers' authors and of timm, one module per format."""
