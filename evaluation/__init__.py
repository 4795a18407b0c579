"""Evaluation of pre-trained encoders: metrics on frozen features, figures and a report."""
