"""Settings of the method and the networks that cannot be: a ValueError that names the field."""

from dataclasses import replace

import pytest
from method_helpers import DIT, UNET

from meanflow.guidance import GuidanceConfig
from meanflow.jvp import take_jvp
from meanflow.objectives.meanflow import MeanFlow
from meanflow.times import Times

V0, V1 = Times(), Times(sampler="v1", mu_r=-4.0, sigma_r=1.6)
IMPOSSIBLE = [  # settings that can be, and values of single fields that cannot
    (UNET, {"image_size": [9, 0], "channels": [0], "width": [7, 0], "multipliers": [(), (1, 0)], "blocks": [0]}),
    (UNET, {"attention": [(16,)], "dropout": [1.0, -0.1], "conditioning": ["t, r"], "augment_labels": [-1]}),
    (UNET, {"classes": [-1]}),
    (DIT, {"image_size": [0], "channels": [0], "patch": [3, 0], "width": [30, 0], "heads": [5, 0], "depth": [0]}),
    (DIT, {"conditioning": ["r"], "classes": [-1]}),
    (V0, {"ratio": [1.2, -0.1], "sigma": [0.0], "sampler": ["v2"], "distribution": ["normal"], "mu_r": [1.0]}),
    (V1, {"mu_r": [None], "sigma_r": [None, -1.0], "distribution": ["uniform"]}),
    (MeanFlow(), {"p": [-0.1], "c": [0.0], "tangent": ["(v, 0, 2)"]}),
    (GuidanceConfig(), {"kappa": [1.0, -0.1], "omega_prime": [0.0], "t_start": [1.5, -0.1], "t_end": [1.5, -0.1]}),
    (GuidanceConfig(t_start=0.6), {"t_end": [0.5], "label_drop": [1.0], "unconditional_rows": ["some"]}),
]


@pytest.mark.parametrize(("settings", "fields"), IMPOSSIBLE, ids=lambda value: type(value).__name__)
def test_what_cannot_be_names_its_field(settings, fields):
    for field, values in fields.items():
        for value in values:
            with pytest.raises(ValueError, match=field):
                replace(settings, **{field: value})


def test_an_unknown_way_of_taking_derivatives():
    with pytest.raises(ValueError, match="method must be one of dual, func, got 'forward'"):
        take_jvp("forward")
