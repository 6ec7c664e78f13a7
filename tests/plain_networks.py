"""A second implementation of each backbone: plain functions of their parameters by name."""

import math

import torch
import torch.nn.functional as F


def plain_network(config):
    """network(parameters by name, config, z, r, t, **cond)."""
    return {"unet": plain_unet, "dit": plain_dit, "imf": plain_imf}[config.kind]


def plain_unet(w, config, z, r, t, class_labels=None, augment_labels=None):
    def affine(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        y = x.reshape(x.shape[0], min(32, x.shape[1] // 4), -1)
        y = (y - y.mean(2, keepdim=True)) / torch.sqrt(y.var(2, unbiased=False, keepdim=True) + 1e-6)
        return y.reshape(x.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def conv(x, name):
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def resample(x, name):
        f = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
        f = torch.outer(f, f)[None, None]
        b, c, height, width = x.shape
        if name.endswith("_down"):
            x = F.conv2d(x.reshape(b * c, 1, height, width), f, padding=1)[:, :, ::2, ::2]
        if name.endswith("_up"):
            wide = torch.zeros(b * c, 1, 2 * height, 2 * width, dtype=x.dtype)
            wide[:, :, ::2, ::2] = x.reshape(b * c, 1, height, width)
            x = F.conv2d(F.pad(wide, (2, 1, 2, 1)), 4 * f)
        return x.reshape(b, c, *x.shape[2:])

    def block(x, name):
        h = conv(resample(F.silu(norm(x, f"{name}.norm0")), name), f"{name}.conv0")
        h = h + affine(emb, f"{name}.affine")[:, :, None, None]
        h = conv(F.silu(norm(h, f"{name}.norm1")), f"{name}.conv1")
        skip = conv(resample(x, name), f"{name}.skip") if f"{name}.skip.weight" in w else x
        x = (h + skip) * 0.5**0.5
        if f"{name}.qkv.weight" in w:
            b, c, *size = x.shape
            q, k, v = conv(norm(x, f"{name}.norm2"), f"{name}.qkv").reshape(b, 3, c, -1).unbind(1)
            attention = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / c**0.5, dim=2)
            a = torch.einsum("bqk,bck->bcq", attention, v).reshape(b, c, *size)
            x = (conv(a, f"{name}.proj") + x) * 0.5**0.5
        return x

    half = config.width  # of sines, and of cosines
    frequencies = (10000 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))).float().to(z)
    angles = [{"t": t, "r": r, "t-r": t - r}[name][:, None] * frequencies for name in config.conditioning.split(",")]
    emb = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)
    emb = emb + augment_labels @ w["map_augment.weight"].T + w["map_class.weight"][class_labels]
    emb = F.silu(affine(F.silu(affine(emb, "map_layer0")), "map_layer1"))
    names = list(dict.fromkeys(".".join(key.split(".")[:2]) for key in w if key.startswith(("enc", "dec"))))
    x, skips = z, []
    for name in [name for name in names if name.startswith("enc")]:
        x = conv(x, name) if name.endswith("_conv") else block(x, name)
        skips.append(x)
    *names, aux_norm, aux_conv = [name for name in names if name.startswith("dec")]
    for name in names:
        x = block(torch.cat([x, skips.pop()], 1) if "_block" in name else x, name)
    return conv(F.silu(norm(x, aux_norm)), aux_conv)


def plain_dit(w, config, z, r, t, class_labels=None):
    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def modulated(x, shift, scale):
        centred = x - x.mean(2, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(2, keepdim=True) + 1e-6) * (1 + scale) + shift

    b, d, p, heads, side = len(z), config.width, config.patch, config.heads, config.image_size // config.patch
    c = w["label_embed.weight"][class_labels] if config.classes else 0
    frequencies = (10000 ** (-torch.arange(128, dtype=torch.float64) / 128)).float().to(z)
    for name in config.conditioning.split(","):
        angle = {"t": t, "r": r, "t-r": t - r}[name][:, None] * frequencies
        wave = torch.cat([angle.cos(), angle.sin()], 1)
        c = c + linear(F.silu(linear(wave, f"time_embed.{name}.fc1")), f"time_embed.{name}.fc2")
    c = F.silu(c)[:, None]

    patches = z.reshape(b, -1, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(b, side**2, -1)
    x = patches @ w["patch_embed.weight"].reshape(d, -1).T + w["patch_embed.bias"]
    waves = [10000 ** (-k / (d // 4)) for k in range(d // 4)]
    positions = [
        [f(place * wave) for place in (column, row) for f in (math.sin, math.cos) for wave in waves]
        for row in range(side)
        for column in range(side)
    ]
    x = x + torch.tensor(positions, dtype=torch.float32).to(z)
    for k in range(config.depth):
        name = f"blocks.{k}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(c, f"{name}.modulation").split(d, 2)
        qkv = linear(modulated(x, shift_a, scale_a), f"{name}.qkv")
        q, k, v = qkv.reshape(b, side**2, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.mT / (d // heads) ** 0.5, dim=-1)
        x = x + gate_a * linear((attention @ v).transpose(1, 2).reshape(b, side**2, d), f"{name}.proj")
        h = linear(modulated(x, shift_m, scale_m), f"{name}.fc1")
        h = 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + gate_m * linear(h, f"{name}.fc2")
    x = linear(modulated(x, *linear(c, "final.modulation").split(d, 2)), "final.linear")
    return x.reshape(b, side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(z.shape)


def plain_official_dit(w, heads, z, time, labels):
    """The official DiT and SiT by their own names: all output channels (a learnt variance after those of z), no r.

    `time` as it is embedded: DiT's step, SiT's time in [0, 1], where 1 is data.
    """

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    frequencies = torch.tensor([math.exp(-math.log(10000) * k / 128) for k in range(128)], dtype=z.dtype)
    angle = time[:, None] * frequencies[None]
    c = linear(torch.cat([torch.cos(angle), torch.sin(angle)], -1), "t_embedder.mlp.0")
    c = linear(F.silu(c), "t_embedder.mlp.2") + F.embedding(labels, w["y_embedder.embedding_table.weight"])
    kernel = w["x_embedder.proj.weight"]
    p, d = kernel.shape[-1], kernel.shape[0]
    x = F.conv2d(z, kernel, w["x_embedder.proj.bias"], stride=p)  # (B, D, side, side)
    side = x.shape[-1]
    place = torch.arange(side, dtype=z.dtype)[:, None] / 10000 ** (torch.arange(d // 4, dtype=z.dtype) / (d / 4))
    axis = torch.cat([place.sin(), place.cos()], 1).T  # (D/2, side)
    columns, rows = axis[:, None, :].expand(-1, side, -1), axis[:, :, None].expand(-1, -1, side)
    x = (x + torch.cat([columns, rows])[None]).flatten(2).mT  # (B, N, D)
    for k in range(sum(name.endswith("attn.qkv.weight") for name in w)):
        m = linear(F.silu(c), f"blocks.{k}.adaLN_modulation.1").unflatten(1, (6, 1, d)).unbind(1)  # six (B, 1, D)
        q, k_, v = linear(norm(x) * (1 + m[1]) + m[0], f"blocks.{k}.attn.qkv").unflatten(2, (3, heads, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k_) * (d // heads) ** -0.5
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = x + m[2] * linear(attended, f"blocks.{k}.attn.proj")
        h = linear(norm(x) * (1 + m[4]) + m[3], f"blocks.{k}.mlp.fc1")
        x = x + m[5] * linear(F.gelu(h, approximate="tanh"), f"blocks.{k}.mlp.fc2")
    shift, scale = linear(F.silu(c), "final_layer.adaLN_modulation.1").unflatten(1, (2, 1, d)).unbind(1)
    x = linear(norm(x) * (1 + scale) + shift, "final_layer.linear")
    return torch.einsum("nhwpqc->nchpwq", x.reshape(len(z), side, side, p, p, -1)).reshape(len(z), -1, *z.shape[2:])


def plain_imf(w, config, z, r, t, class_labels=None, omega=None, t_min=None, t_max=None, head="u"):
    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def embedded(scalar, name):
        frequencies = (10000 ** (-torch.arange(128, dtype=torch.float64) / 128)).float().to(z)
        angle = scalar[:, None] * frequencies
        h = linear(torch.cat([angle.cos(), angle.sin()], 1), f"{name}.mlp.0")
        return linear(h * torch.sigmoid(h), f"{name}.mlp.2")[:, None]

    def rotated(x):  # (B, N, D/heads): pairs as complex numbers
        frequencies = 10000 ** (-torch.arange(0, x.shape[2], 2, dtype=torch.float64) / x.shape[2])
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
        turn = torch.complex(angles.cos().float().to(z), angles.sin().float().to(z))
        return torch.view_as_real(torch.complex(x[..., 0::2], x[..., 1::2]) * turn).reshape(x.shape)

    def block(x, name):
        h, outputs = norm(x, f"{name}.norm1"), []
        q, k, v = (linear(h, f"{name}.attn.{which}_proj").chunk(config.heads, -1) for which in "qkv")
        for qi, ki, vi in zip(q, k, v, strict=True):
            qi, ki = rotated(norm(qi, f"{name}.attn.q_norm")), rotated(norm(ki, f"{name}.attn.k_norm"))
            outputs.append(torch.softmax(qi @ ki.mT / qi.shape[-1] ** 0.5, -1) @ vi)
        x = x + w[f"{name}.attn_scale"] * linear(torch.cat(outputs, -1), f"{name}.attn.out_proj")
        h = norm(x, f"{name}.norm2")
        gate = linear(h, f"{name}.mlp.w1")
        h = gate * torch.sigmoid(gate) * linear(h, f"{name}.mlp.w3")
        return x + w[f"{name}.mlp_scale"] * linear(h, f"{name}.mlp.w2")

    b, d, p, side = len(z), config.width, config.patch, config.image_size // config.patch
    class_labels = torch.full((b,), config.classes) if class_labels is None else class_labels
    omega, t_min, t_max = (
        torch.full_like(t, default) if x is None else x for x, default in ((omega, 1), (t_min, 0), (t_max, 1))
    )
    patches = z.reshape(b, -1, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(b, side**2, -1)
    tokens = [
        w["class_tokens"] + w["y_embedder.embedding_table.weight"][class_labels][:, None],
        w["omega_tokens"] + embedded(1 - 1 / omega, "omega_embedder"),
        w["t_min_tokens"] + embedded(t_min, "cfg_t_start_embedder"),
        w["t_max_tokens"] + embedded(t_max, "cfg_t_end_embedder"),
        w["time_tokens"] + embedded(t - r, "h_embedder"),
        patches @ w["x_embedder.proj.weight"].reshape(d, -1).T + w["x_embedder.proj.bias"],
    ]
    x = torch.cat(tokens, 1)
    for k in range(config.depth - config.head_depth):
        x = block(x, f"shared_blocks.{k}")
    for k in range(config.head_depth):
        x = block(x, f"{head}_heads.{k}")
    x = linear(norm(x[:, 20:], f"{head}_final_layer.norm"), f"{head}_final_layer.linear")
    return x.reshape(b, side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(z.shape)
