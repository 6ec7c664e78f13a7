"""MeanFlow: the method, its data and its training, shared by every recipe."""
