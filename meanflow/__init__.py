"""Mean Flows for One-step Generative Modeling (Geng et al. 2025): the method, and what trains it.

    from meanflow import load, meanflow_loss, sample

The rest is imported where it is needed: `meanflow.objectives`, `meanflow.training`, `meanflow.data`.
"""

from typing import Any

__all__ = ["load", "meanflow_loss", "sample"]
_MODULES = {
    "load": "meanflow.training.model",
    "meanflow_loss": "meanflow.objectives.meanflow",
    "sample": "meanflow.sampling",
}


def __getattr__(name: str) -> Any:
    """Imported at first use, so that `import meanflow.errors` stays quick."""
    if name not in _MODULES:
        raise AttributeError(f"module 'meanflow' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
