"""Contrast: who attracts and repels whom, and how much."""
