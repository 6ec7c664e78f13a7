"""What the official DiT, SiT and MeanFlow releases call the tensors of our DiT."""

import re

import torch
from torch import nn

NAMES_SHOWN = 3
MODULES = {  # ours → that of facebookresearch/DiT, which the others follow
    r"patch_embed": r"x_embedder.proj",
    r"time_embed\.t\.fc1": r"t_embedder.mlp.0",
    r"time_embed\.t\.fc2": r"t_embedder.mlp.2",
    r"time_embed\.t-r\.fc1": r"h_embedder.mlp.0",  # of h = t − r, in MeanFlow only
    r"time_embed\.t-r\.fc2": r"h_embedder.mlp.2",
    r"label_embed": r"y_embedder.embedding_table",
    r"blocks\.(\d+)\.modulation": r"blocks.\1.adaLN_modulation.1",
    r"blocks\.(\d+)\.(qkv|proj)": r"blocks.\1.attn.\2",
    r"blocks\.(\d+)\.(fc1|fc2)": r"blocks.\1.mlp.\2",
    r"final\.modulation": r"final_layer.adaLN_modulation.1",
    r"final\.linear": r"final_layer.linear",
}


def dit_name(ours: str) -> str | None:
    """The name in facebookresearch/DiT of a parameter of our DiT; None if it has none there."""
    module, _, leaf = ours.rpartition(".")
    for pattern, theirs in MODULES.items():
        if found := re.fullmatch(pattern, module):
            return f"{found.expand(theirs)}.{leaf}"
    return None


def jax_name(ours: str) -> tuple[str, ...] | None:
    """The path in the JAX release's tree of a parameter of our DiT; None if it has none there.

    Its layers are flax ones in wrappers: `blocks/layers_0/attn/qkv/_flax_linear/kernel`.
    """
    name = dit_name(ours)
    if name is None:
        return None
    *module, leaf = name.split(".")
    path = tuple(f"layers_{part}" if part.isdigit() else part for part in module)
    if path == ("y_embedder", "embedding_table"):
        return (*path, "_flax_embedding", "embedding")
    wrapper = () if path == ("x_embedder", "proj") else ("_flax_linear",)
    return (*path, *wrapper, "kernel" if leaf == "weight" else leaf)


def parameters_of(network_class: type[nn.Module], config: object) -> dict[str, torch.Size]:
    """{name: shape} of the network of `config`, without making it."""
    with torch.device("meta"):
        return {name: p.shape for name, p in network_class(config).named_parameters()}


def listed(names: list[str], what: str) -> str:
    """'3 tensors missing: a, b, c', with the first few names; '' if there are none."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    shown = ", ".join(sorted(names)[:NAMES_SHOWN])
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} {what}: {shown}{more}" if names else ""
