"""RAdam (Liu et al. 2020, arXiv 1908.03265, Algorithm 2) whose updates can be skipped on the device."""

from collections.abc import Iterable

import torch
from torch import Tensor


class RAdam(torch.optim.Optimizer):
    """`torch.optim.RAdam` with decoupled weight decay, and with the `found_inf` of PyTorch's fused optimisers.

    `found_inf`, if set, is a device scalar: where it is 1, `step` changes nothing, whatever the gradients are, and the
    host does not wait to know. PyTorch's own has no such form. The state of a parameter has Adam's names: step, exp_avg
    and exp_avg_sq.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})

    def _update(self, parameters: list[Tensor], lr: float, betas, eps: float, weight_decay: float) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
                self.state[p] |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        steps, means, squares = (
            [self.state[p][name] for p in parameters] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        skip = parameters[0].new_zeros(()) if self.found_inf is None else self.found_inf.to(parameters[0].device)
        skip = skip > 0
        gradients = [torch.where(skip, 0, p.grad) for p in parameters]  # zero times NaN would be NaN

        torch._foreach_add_(steps, (~skip).to(steps[0]))
        (beta1, beta2), one = betas, torch.ones((), device=skip.device)
        torch._foreach_mul_(means, torch.where(skip, one, beta1))
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        torch._foreach_mul_(squares, torch.where(skip, one, beta2))
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)

        # The coefficients of m/(√v + ε) and of m, for each parameter, since their steps may differ.
        k = torch.stack(steps).double()
        correction1, correction2 = 1 - beta1**k, 1 - beta2**k
        longest = 2 / (1 - beta2) - 1  # ρ_∞
        length = longest - 2 * k * beta2**k / correction2  # ρ_k
        rectified = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)).sqrt()
        adaptive = torch.where(length > 5, rectified * correction2.sqrt(), 0)
        plain = torch.where(length > 5, 0, 1)
        along = [torch.where(skip, 0, lr * factor / correction1).float() for factor in (adaptive, plain)]
        if weight_decay:
            torch._foreach_mul_(parameters, torch.where(skip, one, 1 - lr * weight_decay))
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_add_(denominators, eps)
        updates = torch._foreach_div(means, denominators)
        torch._foreach_mul_(updates, list(along[0].unbind()))
        torch._foreach_add_(updates, torch._foreach_mul(means, list(along[1].unbind())))
        torch._foreach_sub_(parameters, updates)
