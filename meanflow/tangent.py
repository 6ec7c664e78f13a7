"""The two ways to take u and du/dt together: one small interface, (value with its graph, tangent without)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow.dual import Dual

Network = Callable[..., Tensor]  # u(z, t, r, **cond)
JVPS = ("dual", "func")


def value_and_tangent(
    u: Network, z: Tensor, t: Tensor, r: Tensor, tangents: tuple[Tensor, float, float], rows: int, jvp: str, cond: dict
) -> tuple[Tensor, Tensor]:
    """u(z, t, r) for all B rows and its derivative along `tangents` = (dz, dt, dr) for the first `rows`.

    z (B, …); t, r (B,); dz (rows, …) → (B, …) with its graph and (rows, …) detached. `jvp` is "dual"
    (`meanflow.dual`: explicit rules, one pass) or "func" (`torch.func.jvp`: any differentiable network, more memory).
    """
    if rows == 0:
        return u(z, t, r, **cond), z.new_zeros(0, *z.shape[1:])
    return (_by_dual if jvp == "dual" else _by_func)(u, z, t, r, tangents, rows, cond)


def _by_dual(u, z, t, r, tangents, rows, cond):
    dz, dt, dr = tangents

    def along(x: Tensor, speed: float) -> Tensor | Dual:
        return Dual(x, torch.full_like(x[:rows], speed)) if speed else x

    out = u(Dual(z, dz), along(t, dt), along(r, dr), **cond)
    if not isinstance(out, Dual):  # it depends on none of them
        return out, torch.zeros_like(dz)
    return out.value, out.tangent


def _by_func(u, z, t, r, tangents, rows, cond):
    """`torch.func.jvp` on the rows that need it, a plain pass on the rest."""
    dz, dt, dr = tangents

    def split(x, part):
        return x[part] if isinstance(x, Tensor) else x

    first, rest = slice(None, rows), slice(rows, None)
    moving = {key: split(x, first) for key, x in cond.items()}
    where = (z[first], t[first].clone(), r[first].clone())  # views fail under torch.compile (2.14)
    speeds = (dz, torch.full_like(where[1], dt), torch.full_like(where[2], dr))
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
        value, tangent = torch.func.jvp(lambda *ztr: u(*ztr, **moving), where, speeds)
    if rows < z.shape[0]:
        still = {key: split(x, rest) for key, x in cond.items()}
        value = torch.cat([value, u(z[rest], t[rest], r[rest], **still)])
    return value, tangent.detach()
