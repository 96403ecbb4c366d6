"""Metrics, the networks that they look through, and evaluations over a data set."""
