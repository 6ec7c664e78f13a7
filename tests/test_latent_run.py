"""The latent path end to end in small: latents of digits, a guided DiT, samples that are images again."""

import json

import pytest
import torch
from running import comparable_metrics, guided_latent_changes, tiny_config

from eval.scoring.classifier import agreement
from eval.scoring.score import preflight
from meanflow.data import batch_indices, open_latents
from meanflow.data.codec import SpaceToDepth
from meanflow.data.prepare_latents import prepare
from meanflow.errors import AssetError, ConfigError
from meanflow.random import generator
from meanflow.training.batches import BatchStream
from meanflow.training.checkpoint import load_newest
from meanflow.training.model import generate, load_model, noise
from meanflow.training.processes import DistributedContext

CPU = torch.device("cpu")


@pytest.fixture
def changes(tmp_path):
    return guided_latent_changes(tmp_path / "latents")


@pytest.fixture
def latents(tmp_path, changes):
    config = tiny_config(**changes)
    prepare(config.data, 0, 1, CPU)
    return open_latents(tmp_path / "latents", config.data)


def batches(latents, step=0, world=1, rank=0, **changes):
    stream = BatchStream(latents, tiny_config(**changes), DistributedContext(rank, world, CPU))
    return list(stream.micro_batches(step))


def test_a_batch_is_the_posterior_of_the_images_in_order(latents, changes):
    """x = scale (mean + std·noise), of the mirror where the coin says so."""
    (batch,) = batches(latents, step=3, **changes)
    indices = batch_indices(len(latents), 3, 3 * 8, 8)
    mirror = torch.rand(8, generator=generator(3, "mirror", 3)) < 0.5
    assert mirror.any() and not mirror.all()
    mean, _ = latents.read(indices, mirror)  # space-to-depth has no spread
    rows = [int((batch.x - x).abs().flatten(1).amax(1).argmin()) for x in mean.float()]
    assert sorted(rows) == list(range(8))
    assert torch.equal(batch.x[rows], mean.float())
    assert torch.equal(batch.cond["class_labels"][rows], latents.labels[indices])


def test_the_posterior_has_the_spread_that_was_stored(latents, changes, monkeypatch):
    monkeypatch.setattr(latents, "scale", 0.5)
    monkeypatch.setattr(
        latents, "read", lambda i, m: (torch.ones(len(i), 4, 4, 4).half(), torch.full((len(i), 4, 4, 4), 2.0).half())
    )
    (batch,) = batches(latents, train__batch=512, **changes)
    assert batch.x.mean() == pytest.approx(0.5, abs=0.02) and batch.x.std() == pytest.approx(1.0, rel=0.02)
    assert not torch.equal(batch.x, batches(latents, step=1, train__batch=512, **changes)[0].x)


def test_processes_and_micro_batches_see_the_same_samples(latents, changes):
    (whole,) = batches(latents, **changes)
    parts = [b for rank in (0, 1) for b in batches(latents, world=2, rank=rank, train__microbatch=2, **changes)]
    for field in ("x", "eps", "t", "r", "dropped"):
        together = torch.cat([getattr(part, field) for part in parts])
        one, many = (y.double().reshape(8, -1) for y in (getattr(whole, field), together))
        one, many = (y[torch.argsort(y.sum(1), stable=True)] for y in (one, many))
        assert torch.equal(one, many), field


def test_steps_may_be_taken_in_any_order(latents, changes):
    """What was read ahead is used for its own step alone."""
    stream = BatchStream(latents, tiny_config(**changes), DistributedContext(0, 1, CPU))
    forward = [next(stream.micro_batches(step)).x for step in range(3)]
    assert torch.equal(next(stream.micro_batches(1)).x, forward[1])
    assert torch.equal(next(stream.micro_batches(0)).x, forward[0])


def test_a_killed_run_resumes_bit_equal(train_tiny, tmp_path, changes):
    changes |= {"guidance__omega_prime": 2.0, "guidance__omega": 1.0, "guidance__kappa": 0.5}
    whole = train_tiny("whole", train__steps=6, **changes)
    train_tiny("parts", train__steps=3, **changes)
    parts = train_tiny("parts", train__steps=6, **changes)
    a, b = (load_newest(run.checkpoints)[1] for run in (whole, parts))
    for name in a.model:
        assert torch.equal(a.model[name], b.model[name]), name
        assert torch.equal(a.ema["0.9"][name], b.ema["0.9"][name]), name
    assert comparable_metrics(whole.path) == comparable_metrics(parts.path)


def test_activation_checkpointing_changes_nothing_but_memory(train_tiny, changes):
    for model in ({}, changes):
        plain = train_tiny(f"plain{len(model)}", **model)
        again = train_tiny(f"again{len(model)}", **model, train__activation_checkpointing=True)
        a, b = (load_newest(run.checkpoints)[1].model for run in (plain, again))
        for name in a:
            assert torch.allclose(a[name], b[name], rtol=1e-5, atol=1e-7), name


def test_averages_on_the_host_are_the_same(train_tiny, changes):
    a, b = (
        load_newest(train_tiny(store, ema__store=store, **changes).checkpoints)[1].ema for store in ("device", "host")
    )
    assert all(torch.equal(a["0.9"][name], b["0.9"][name]) for name in a["0.9"])


def test_samples_are_decoded(train_tiny, changes):
    run = train_tiny(**changes)
    model = load_model(run.path, None, CPU)
    labels = torch.arange(4)
    images = generate(model, 0, 4, 1, 7, labels)
    assert images.shape == (4, 1, 8, 8)
    z = noise(7, 0, 4, (4, 4, 4))
    with torch.no_grad():
        latent = z - model.network(z, torch.ones(4), torch.zeros(4), labels)
    assert torch.allclose(images, SpaceToDepth(CPU).decode(latent), atol=1e-6)


def test_without_its_vae_a_run_is_not_sampled(train_tiny, changes, tmp_path):
    run = train_tiny(**changes)
    path = load_newest(run.checkpoints)[0]
    content = torch.load(path, weights_only=True)
    meta = json.loads(content["meta"])
    meta["config"]["data"]["vae"] = str(tmp_path / "nowhere")
    torch.save({**content, "meta": json.dumps(meta)}, tmp_path / "other.pt")
    with pytest.raises(AssetError, match="vae"):
        load_model(tmp_path / "other.pt", None, CPU)


def test_a_reference_that_cannot_be_fetched_does_not_stop_training(changes, monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.chdir(tmp_path)
    (line,) = preflight(tiny_config(**changes, eval__extractor="thumbnails", eval__reference="adm-imagenet256"))
    assert "trained but not scored" in line and "VIRTUAL_imagenet256_labeled.npz" in line
    assert preflight(tiny_config(**changes)) == []
    with pytest.raises(AssetError, match="mine"):
        preflight(tiny_config(**changes, eval__reference="mine.npz"))


def test_agreement_counts_what_the_classifier_says(train_tiny, changes, monkeypatch):
    run = train_tiny(**changes)
    model = load_model(run.path, None, CPU)
    found = agreement(model, 200, 1)
    assert 0 <= found.agreement < 0.5 and 0.95 < found.real < 1  # six steps teach nothing
    from meanflow.data.dataset import digits

    real = digits("train")

    def ideal(model, start, stop, steps, seed, labels):
        pick = [int((real.labels == label).nonzero()[k % 100]) for k, label in enumerate(labels)]
        return real.images[pick].float() / 127.5 - 1

    monkeypatch.setattr("eval.scoring.classifier.generate", ideal)
    assert agreement(model, 200, 1).agreement > 0.99


def test_a_network_of_another_shape_is_named(train_tiny, changes):
    changes["model"] |= {"image_size": 8}
    with pytest.raises(ConfigError, match="image_size"):
        train_tiny(**changes)


def test_wrong_classes_are_named_before_anything_is_encoded(train_tiny, changes, tmp_path):
    changes["model"] |= {"classes": 7}
    with pytest.raises(ConfigError, match=r"model\.classes=10"):
        train_tiny(**changes)
    assert not (tmp_path / "latents").exists()


# --- fine-tuning -------------------------------------------------------------------------------------------------


def test_init_takes_the_average_of_another_run(train_tiny, changes):
    source = train_tiny("source", **changes)
    before = load_newest(source.checkpoints)[1]
    changes["model"] |= {"classes": 10}
    tuned = train_tiny("tuned", **changes, init__from=str(source.path), train__steps=1, optim__lr=1e-12)
    after = load_newest(tuned.checkpoints)[1]
    for name, weight in before.ema["0.9"].items():
        assert torch.allclose(after.model[name], weight, atol=1e-9), name
        assert torch.allclose(after.ema["0.9"][name], weight, atol=1e-9), name
    listed = json.loads((tuned.path / "init.json").read_text())
    assert len(listed["taken"]) == len(before.model) and not listed["fresh"] and listed["step"] == 6


def test_init_lists_what_does_not_fit(train_tiny, changes, capsys, tmp_path):
    source = train_tiny("source", **changes)
    changes["model"] |= {"conditioning": "t,r", "depth": 3}
    tuned = train_tiny("tuned", **changes, init__from=str(source.path))
    listed = json.loads((tuned.path / "init.json").read_text())
    assert any(name.startswith("blocks.2.") for name in listed["fresh"])
    assert any(name.startswith("time_embed.r.") for name in listed["fresh"])
    assert all(name.startswith("time_embed.t-r.") for name in listed["unused"]) and listed["unused"]
    source.path.rename(tmp_path / "gone")  # it was needed once, to begin
    assert load_newest(train_tiny("tuned", **changes, init__from=str(source.path), train__steps=8).checkpoints)[0]


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"init__from": "nowhere"}, AssetError, "nowhere"),
        ({"init__from": "source", "init__ema": 0.5}, ConfigError, "init.ema"),
        ({"init__from": "source", "model": None}, ConfigError, "another network"),
    ],
)
def test_init_refuses_what_it_cannot_use(train_tiny, changes, tmp_path, change, error, word):
    source = train_tiny("source", **changes)
    if change["init__from"] == "source":
        change = {**change, "init__from": str(source.path)}
    if "model" in change:  # a U-net on pixels
        change = {"init__from": change["init__from"]}
        changes = {}
    with pytest.raises(error, match=word):
        train_tiny("tuned", **changes, **change)
