"""The network of iMF: sizes, against its plain implementation, its branches, conditions and derivatives."""

import functools
from dataclasses import replace

import pytest
import torch
from method_helpers import IMF as SMALL
from method_helpers import assert_close, batch, precisions, small, with_gradient
from plain_networks import plain_imf
from running import tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit import IMF, IMFConfig
from dit.imf import PREFIX
from dit.imf_layers import Block, RMSNorm, rotate, rotation_table
from meanflow.dual import Dual, value_of
from meanflow.jvp import dual_jvp, plain_operations
from meanflow.training.step import in_training_precision

# width, depth, heads; parameters without and with v's branch; multiply-adds of u on one sample. In words: 88.9 M
# (145.6 M), 173.9 M, 409.1 M and 610.4 M.
SIZES = {
    "B/2": ((768, 12, 12), 88_935_184, 145_596_960, 24_855_478_272),
    "M/2": ((768, 24, 12), 173_908_240, 230_570_016, 49_701_519_360),
    "L/2": ((1024, 32, 16), 409_054_224, 509_752_352, 116_120_092_672),
    "XL/2": ((1024, 48, 16), 610_415_632, 711_113_760, 174_173_323_264),
}
N = 5  # rows with a tangent, of 8


def conditions(dtype=torch.float64, n: int = 8) -> dict[str, torch.Tensor]:
    omega, t_min, t_max = torch.rand(3, n, generator=torch.Generator().manual_seed(2), dtype=dtype)
    labels = torch.arange(n) % (SMALL.classes + 1)
    return {"class_labels": labels, "omega": 1 + 7 * omega, "t_min": t_min / 2, "t_max": 0.5 + t_max / 2}


def on_dual(net, b, v, **how):
    """The network along (v, 0, 1) in the first N rows."""
    return net(Dual(b.x, v[:N]), b.r, Dual(b.t, torch.ones_like(b.t[:N])), **how)


# --- shape and initial values -------------------------------------------------------------------------------------


def multiply_adds(net, z, r, t, **how) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(z, r, t, **how)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds_of_the_four_sizes(name):
    (width, depth, heads), alone, both, expected = SIZES[name]
    with torch.device("meta"):
        net = IMF(IMFConfig("imf", 32, 4, 2, width, depth, heads, classes=1000))
        z, time = torch.zeros(1, 4, 32, 32), torch.zeros(1)
    assert sum(p.numel() for p in net.parameters()) == both
    net.drop_v_head()
    assert sum(p.numel() for p in net.parameters()) == alone
    assert multiply_adds(net, z, time, time) == expected
    # Of each block: 7 matrices and attention over 276 tokens. The rest are embedders and the output.
    block = 276 * (4 * width**2 + 3 * width * int(8 / 3 * width)) + 2 * 276**2 * width
    assert 0 <= expected - depth * block < 0.003 * expected


def test_multiply_adds_of_both_branches():
    net, z, t = (
        small(SMALL, torch.float32).to("meta"),
        torch.zeros(1, 3, 8, 8, device="meta"),
        torch.zeros(1).to("meta"),
    )
    u, v, both = (multiply_adds(net, z, t, t, head=head) for head in ("u", "v", "both"))
    branch = 2 * (36 * (4 * 32**2 + 3 * 32 * 85) + 2 * 36**2 * 32) + 16 * 32 * 12
    assert u == v and both == u + branch


def test_output_is_zero_and_blocks_are_the_identity_at_initialisation():
    net, b = IMF(SMALL), batch(SMALL, torch.float32)
    assert not any(out.any() for out in net(b.x, b.r, b.t, head="both", **conditions(torch.float32)))
    x = torch.randn(8, 36, 32)
    assert torch.equal(net.u_heads[0](x, net.rotation), x)


def test_initial_weights():
    torch.manual_seed(0)
    net = IMF(replace(SMALL, width=256, classes=500))
    block, tables = net.shared_blocks[0], [net.y_embedder.embedding_table.weight, net.class_tokens]
    stds = [(0.32, 256, block.attn.q_proj.weight), (0.32, 682, block.mlp.w2.weight)]
    stds += [(1, 256, net.omega_embedder.mlp[0].weight), (1, 256, net.h_embedder.mlp[2].weight)]
    for std, fan_in, weight in [*stds, *((1, 256, table) for table in tables)]:
        assert weight.detach().std() == pytest.approx(std / fan_in**0.5, rel=0.05)
    bound = (6 / (256 + 12)) ** 0.5  # Xavier, uniform
    assert 0.95 * bound < net.x_embedder.proj.weight.abs().max() <= bound
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith(("bias", "_scale")))
    assert all((m.weight == 1).all() for m in net.modules() if isinstance(m, RMSNorm))


@pytest.mark.parametrize(
    "change", [{"patch": 3}, {"width": 30}, {"width": 36}, {"head_depth": 4}, {"head_depth": 0}, {"classes": -1}]
)
def test_what_cannot_be_built_is_refused_by_name(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}.* (must be|does not divide)"):
        replace(SMALL, **change)


# --- against the plain implementation -----------------------------------------------------------------------------


@precisions
@pytest.mark.parametrize(
    "config",
    [SMALL, replace(SMALL, heads=1, head_depth=3), replace(SMALL, patch=1, image_size=3, channels=2, classes=0)],
    ids=["small", "nothing shared", "unconditional"],
)
def test_equals_a_plain_implementation(config, dtype, tolerance):
    net, b, cond = small(config, dtype), batch(config, dtype), conditions(dtype)
    cond = cond if config.classes else {}
    for head in ("u", "v"):
        expected = plain_imf(net.state_dict(), config, b.x, b.r, b.t, head=head, **cond)
        assert_close([net(b.x, b.r, b.t, head=head, **cond)], [expected], tolerance)


def test_rotations_leave_only_the_distance_of_two_positions():
    """⟨R_i q, R_j k⟩ is a function of i − j, and ⟨q, k⟩ at i = j."""
    q, k = torch.randn(2, 16, dtype=torch.float64)
    table = rotation_table(9, 16).double()
    at_all = [rotate(x.expand(9, 16), table) for x in (q, k)]
    products = at_all[0] @ at_all[1].T
    for distance in range(-8, 9):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)
    assert products[4, 4] == pytest.approx(float(q @ k), abs=1e-6)
    turned = torch.complex(q[0], q[1]) * torch.exp(torch.tensor(2j))  # the first pair turns by its position
    assert torch.allclose(at_all[0][2, :2], torch.view_as_real(turned), atol=1e-6)


# --- branches -----------------------------------------------------------------------------------------------------


def test_a_branch_that_is_not_asked_for_is_not_run():
    net, b, cond = small(SMALL), batch(SMALL), conditions()
    u, v = net(b.x, b.r, b.t, head="both", **cond)
    assert not torch.allclose(u, v)
    for branch, head, expected in (("v", "u", u), ("u", "v", v)):
        broken = small(SMALL)
        for name, p in broken.named_parameters():
            if name.startswith(f"{branch}_"):
                p.data.fill_(torch.nan)
        assert torch.equal(broken(b.x, b.r, b.t, head=head, **cond), expected)


def test_in_training_v_has_no_tangent():
    net, b, seen = small(SMALL), batch(SMALL), {}
    for branch in ("u", "v"):
        first = getattr(net, f"{branch}_heads")[0]
        first.register_forward_pre_hook(lambda _, inputs, branch=branch: seen.update({branch: type(inputs[0])}))
    on_dual(in_training_precision(net, tiny_config().train), b, torch.ones_like(b.x), head="both", **conditions())
    assert seen == {"u": Dual, "v": torch.Tensor}


def test_without_its_branch_v_is_refused_and_u_is_the_same():
    net, b = small(SMALL), batch(SMALL)
    u = net(b.x, b.r, b.t)
    net.drop_v_head()
    assert torch.equal(net(b.x, b.r, b.t), u) and net.config == replace(SMALL, v_head=False)
    assert net.config.branches == ("u",) and list(net.state_dict()) == list(IMF(net.config).state_dict())
    for head in ("v", "both"):
        with pytest.raises(ValueError, match="without v_head"):
            net(b.x, b.r, b.t, head=head)
    with pytest.raises(ValueError, match="head must be u, v, both, got 'w'"):
        net(b.x, b.r, b.t, head="w")


# --- conditions ---------------------------------------------------------------------------------------------------


def test_each_condition_reaches_its_own_tokens_alone():
    net, b, cond = small(SMALL), batch(SMALL), conditions()
    given = {"z": b.x, "h": b.t - b.r, **cond}
    changed = {**{key: x + 0.1 for key, x in given.items()}, "class_labels": (cond["class_labels"] + 1) % 11}
    of_tokens = {"class": "class_labels", "time": "h", **{key: key for key in ("omega", "t_min", "t_max")}}
    sizes = {of_tokens[name]: count for name, count in PREFIX.items()} | {"z": 16}
    assert sizes == {"class_labels": 8, "omega": 4, "t_min": 2, "t_max": 2, "h": 4, "z": 16}
    before = net.embed(**given).split(list(sizes.values()), 1)
    for key, value in changed.items():
        after = net.embed(**given | {key: value}).split(list(sizes.values()), 1)
        same = {name: torch.equal(x, y) for name, x, y in zip(sizes, before, after, strict=True)}
        assert same == {name: name != key for name in sizes}


def test_no_condition_is_the_null_class_and_no_guidance_everywhere():
    net, b, one = small(SMALL), batch(SMALL), torch.ones(8, dtype=torch.float64)
    none = {"class_labels": torch.full((8,), 10), "omega": one, "t_min": 0 * one, "t_max": one}
    assert torch.equal(net(b.x, b.r, b.t), net(b.x, b.r, b.t, **none))
    for key, value in conditions().items():
        assert not torch.allclose(net(b.x, b.r, b.t), net(b.x, b.r, b.t, **{key: value}))


def test_of_the_times_only_their_difference_is_seen():
    net, b, cond = small(SMALL), batch(SMALL), conditions()
    out, shifted, longer = (net(b.x, b.r + dr, b.t + dt, **cond) for dr, dt in ((0, 0), (0.1, 0.1), (0, 0.1)))
    assert torch.allclose(out, shifted, rtol=1e-10, atol=1e-12) and not torch.allclose(out, longer)


# --- derivatives --------------------------------------------------------------------------------------------------


def test_derivative_equals_func_jvp_and_central_differences():
    """Of both heads; with `primal` v has none, and the same value."""
    net, b, cond, h = small(SMALL), batch(SMALL), conditions(), 1e-5
    z, v = b.x, b.eps

    def at(z, t):
        return torch.stack(net(z, b.r, t, head="both", **cond))

    with sdpa_kernel(SDPBackend.MATH):
        values, tangents = torch.func.jvp(at, (z, b.t), (v, torch.ones_like(b.t)))
    with torch.no_grad():
        differences = (at(z + h * v, b.t + h) - at(z - h * v, b.t - h)) / (2 * h)
    assert torch.allclose(tangents, differences, rtol=1e-6, atol=1e-7)
    found = on_dual(net, b, v, head="both", **cond)
    assert_close([y.value for y in found], values, 1e-12)
    assert_close([y.tangent for y in found], tangents[:, :N], 1e-12)
    alone, primal = on_dual(net, b, v, head="both", primal=value_of, **cond)
    assert torch.equal(alone.tangent, found[0].tangent) and torch.equal(primal, found[1].value)
    assert primal.requires_grad and not alone.tangent.requires_grad
    assert torch.equal(on_dual(net, b, v, head="v", **cond).tangent, found[1].tangent)


def test_v_costs_no_tangent():
    """Multiply-adds with all rows' tangents: the trunk and u's branch twice, v's once."""
    net, b = small(SMALL, torch.float32).to("meta"), batch(SMALL, torch.float32)
    z, t, ones = (y.to("meta") for y in (b.x, b.t, torch.ones_like(b.t)))
    counts = {}
    for name, how in {"u": {}, "both": {"head": "both", "primal": value_of}}.items():
        for kind, inputs in {"plain": (z, t * 0, t), "dual": (Dual(z, z), t * 0, Dual(t, ones))}.items():
            with FlopCounterMode(display=False) as counter:
                net(*inputs, **how)
            counts[name, kind] = counter.get_total_flops()
    assert counts["both", "dual"] - counts["u", "dual"] == counts["both", "plain"] - counts["u", "plain"] > 0


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"activation_checkpointing": "cheap"}, 1e-6),
        ({"activation_checkpointing": "blocks"}, 1e-6),
        ({"precision": "bf16"}, 2e-2),
        ({"precision": "bf16", "activation_checkpointing": "cheap"}, 2e-2),
        ({"tangent_precision": "bf16"}, 2e-2),
    ],
    ids=str,
)
def test_ways_of_training_give_the_same(changes, tolerance):
    net, b, cond = small(SMALL, torch.float32), batch(SMALL, torch.float32), conditions(torch.float32)
    found = []
    for train in (tiny_config().train, replace(tiny_config().train, **changes)):
        u, sizes = in_training_precision(net, train), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.nbytes) or x, lambda x: x):
            out, v = on_dual(u, b, b.eps, head="both", primal=value_of, **cond)
        assert out.value.dtype == out.tangent.dtype == v.dtype == torch.float32
        loss = out.value.square().flatten(1).sum(1) + v.square().flatten(1).sum(1)
        found.append([out.tangent, *with_gradient(net, loss), sum(sizes)])
    (*expected, kept), (*ours, fewer) = found
    assert_close(ours, expected, tolerance)
    how = changes.get("activation_checkpointing")
    assert fewer < {"blocks": 0.15, "cheap": 0.85}.get(how, 1.01) * kept


def test_the_graph_to_compile_gives_the_same():
    net, b, cond = small(replace(SMALL, depth=2, head_depth=1)), batch(SMALL), conditions()

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.u = net, functools.partial(net, head="both", primal=value_of)

        def forward(self, z, r, t, dz, cond):
            return dual_jvp(self.u, z, r, t, (dz, 0.0, 1.0), cond)

    inputs = (b.x, b.r, b.t, b.eps[:N], cond)
    (u, v), dudt = plain_operations(Step(), inputs)(*inputs)
    expected = on_dual(net, b, b.eps, head="both", primal=value_of, **cond)
    assert_close([u, v, dudt], [expected[0].value, expected[1], expected[0].tangent], 1e-12)


def test_blocks_run_in_bf16_and_normalise_in_float32():
    """Queries and keys are normalised and turned in float32, then attended to in bf16."""
    seen = []

    def attention(q, k, v):
        seen.append((q.dtype, v.dtype))
        return v

    torch.manual_seed(0)
    block, norms = Block(32, 4), []
    block.attn.q_norm.register_forward_hook(lambda module, inputs, out: norms.append((inputs[0].dtype, out.dtype)))
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
        out = block(torch.randn(2, 5, 32), rotation_table(5, 8))
    assert norms == [(torch.bfloat16, torch.float32)] and out.dtype == torch.float32
    assert seen == [(torch.float32, torch.bfloat16)]  # what autocast makes bf16 of
