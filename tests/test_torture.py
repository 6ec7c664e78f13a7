"""The promises of docs/reliability.md, with little to do each; `bash run.sh torture` does much."""

import pytest
from torture import haul, kills, nodes, ranks, storage

SHORT = {
    "kills": lambda folder: kills.anywhere(folder, kills=8),
    "latents": kills.in_preparation,
    "storage": lambda folder: storage.damaged(folder, times=6),
    "truth": lambda folder: ranks.truth(folder, (1, 4), steps=2),
    "elastic": lambda folder: ranks.elastic(folder, (1, 2, 1), steps=2),
    "drift": lambda folder: ranks.drift(folder, world=2),
    "nodes": lambda folder: nodes.two_agents(folder, steps=12),
    "failure": nodes.one_fails,
    "repeat": lambda folder: ranks.repeat(folder, steps=3),
    "haul": lambda folder: haul.steps(folder, steps=400),
    "scores": lambda folder: haul.evaluations(folder, count=8),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_promise_is_kept(tmp_path, name):
    assert SHORT[name](tmp_path)
