"""In and out: export to native encoders, convert authors' checkpoints, write model cards."""
