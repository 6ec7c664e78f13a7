"""Reads run folders and checkpoints only: samples, scores, curves. Nothing imports it."""
