"""Files and images → what to train on.

dataset.py           the settings, images in memory, the order in which they are seen
cache.py             … kept once they are decoded
layout.py            a folder, zip or tar of images: which files, which classes
archives.py          … opened, with what is unsafe refused
parquet.py           … or parquet files, as the Hugging Face hub has them
images.py            … decoded, cropped and converted
check.py             all that is wrong with one at once
augment.py           EDM's augmentation
latents.py           the settings, and random access to prepared latents
prepare_latents.py   images → latents
shards.py            … and their files
codec.py             the VAE
"""

from meanflow.data.dataset import DataConfig, Dataset, batch_indices, load_dataset
from meanflow.data.latents import Latents, LatentsConfig, open_latents

__all__ = [
    "DataConfig",
    "Dataset",
    "Latents",
    "LatentsConfig",
    "batch_indices",
    "load_dataset",
    "open_latents",
]
