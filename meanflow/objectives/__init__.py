"""Training objectives, one file each. A recipe's `objective.kind` names the class found here."""

from meanflow.objectives.base import Loss, Objective

__all__ = ["Loss", "Objective"]
