"""Scoring: what is evaluated, by which features, against which reference, with which metrics."""
