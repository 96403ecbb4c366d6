"""Measure images by metrics and the networks that they look through, and evaluate models over a data set."""
