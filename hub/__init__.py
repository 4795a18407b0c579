"""Convert, open, export and upload models, and write their cards."""
