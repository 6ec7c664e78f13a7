"""The paper's tables as data: runs of recipes that differ in a few settings, set beside the paper's figures."""
