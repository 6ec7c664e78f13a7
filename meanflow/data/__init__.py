"""Images and latents: where they come from, in which order they are seen, how they are augmented."""

from meanflow.data.config import DataConfig
from meanflow.data.dataset import Dataset, load_dataset
from meanflow.data.latents import Latents, LatentsConfig, open_latents
from meanflow.data.order import batch_indices, epoch_order

__all__ = [
    "DataConfig",
    "Dataset",
    "Latents",
    "LatentsConfig",
    "batch_indices",
    "epoch_order",
    "load_dataset",
    "open_latents",
]
