"""The promises of docs/reliability.md, with little to do each; `bash run.sh stress` does much."""

import pytest
from stress import kills, nodes, ranks, soak, storage

SHORT = {
    "kills": lambda folder: kills.anywhere(folder, kills=4, steps_each=8),
    "latents": kills.in_preparation,
    "storage": lambda folder: storage.damaged(folder, times=4),
    "truth": lambda folder: ranks.truth(folder, (1, 4), steps=2),
    "elastic": lambda folder: ranks.elastic(folder, (1, 2, 1), steps=2),
    "drift": lambda folder: ranks.drift(folder, world=2),
    "nodes": lambda folder: nodes.agents(folder, nodes=2, each=1, steps=4, kills=0, kind=nodes.Forked),
    "failure": nodes.one_fails,
    "repeat": lambda folder: ranks.repeat(folder, steps=3),
    "soak": lambda folder: soak.steps(folder, steps=120),
    "scores": lambda folder: soak.evaluations(folder, count=6),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_promise_is_kept(tmp_path, name):
    assert SHORT[name](tmp_path)
