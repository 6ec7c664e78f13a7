"""The paper's tables as data: runs of recipes that differ in a few settings, set beside the paper's figures."""

SCALES = ("full", "gpu", "cpu")  # the paper's size, one graphics card, two CPU cores
