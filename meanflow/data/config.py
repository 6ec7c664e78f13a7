"""What to train on and how to augment it: the `data` section of a recipe."""

from dataclasses import dataclass
from typing import Literal

from meanflow.data.augment import ANISOTROPIES, AUGMENT_LABELS

SOURCES = ("cifar10", "digits")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are augmented.

    Raises:
        ValueError: a field is out of range; the message begins with the field's name.
    """

    kind: Literal["images"] = "images"
    source: str = "cifar10"  # cifar10, or digits: scikit-learn's 8×8 handwritten digits
    root: str = "data"  # folder where downloads live
    path: str | None = None  # your own images instead of `source`: a folder, zip or tar of class folders
    split: str = "train"  # which part of the images, train or test
    augment_p: float = 0.0  # probability of each of scaling, anisotropy and translation, 0 … 1 (EDM: 0.12)
    anisotropy: str = "appendix"  # as EDM's appendix F.2 has it, or "official": as the official release (augment.py)
    flip: bool = False  # mirror every image on a fair coin, one of the labels that the network is given
    flip_unlabelled: bool = False  # mirror every image on another fair coin first, which the network is not told

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, not {self.source!r}")
        if not self.root:
            raise ValueError("root must name the folder for downloads, not be empty")
        if self.path is not None and not self.path:
            raise ValueError("path must name a folder, zip or tar of images, or be null")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {self.split!r}")
        if not 0 <= self.augment_p <= 1:
            raise ValueError(f"augment_p must lie in 0 … 1, not {self.augment_p}")
        if self.anisotropy not in ANISOTROPIES:
            raise ValueError(f"anisotropy must be one of {', '.join(ANISOTROPIES)}, not {self.anisotropy!r}")
        for name in ("flip", "flip_unlabelled"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")

    @property
    def augment_labels(self) -> int:
        """Width of the label vector that tells the network how an image was augmented: 6, or 0 if never."""
        return AUGMENT_LABELS if self.augment_p > 0 or self.flip else 0
