"""What was learned: pictures and measurements of a pre-trained encoder."""
