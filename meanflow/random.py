"""Seeds derived from a run's seed and a purpose, so that no two purposes share a stream.

Every random number of a run is a function of (seed, purpose, numbers): `generator(seed, "noise", step)` gives
the same stream in a run that never stopped, in one that was resumed, and on any number of processes.
"""

import hashlib
import json
import operator
from collections.abc import Callable

import torch


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Hash (seed, purpose, numbers) to an integer in [0, 2^63).

    purpose: such as "order" or "noise"; numbers: such as epoch, step or rank. Raises TypeError unless seed and numbers
    are integers: a float would make the result depend on rounding.
    """
    # JSON is canonical for one string and integers: distinct arguments never give equal bytes.
    key = json.dumps([operator.index(seed), str(purpose), *map(operator.index, numbers)])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch.Generator on `device`, seeded by `derive_seed(seed, purpose, *numbers)`.

    PyTorch's CPU generator keeps only 32 bits of its seed, CUDA's all of them: of 50,000 CPU generators, two
    are the same with a chance of one in four.
    """
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *numbers))


def generators_now(device: torch.device) -> Callable[[], None]:
    """A call that puts PyTorch's default generators, the CPU's and that of `device`, back to where they are now.

    What is drawn after it, such as a dropout mask, is what was drawn after this. Does not wait for the device.
    """
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return restore
