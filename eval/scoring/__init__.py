"""Scoring: sources of images, features, references and metrics."""
