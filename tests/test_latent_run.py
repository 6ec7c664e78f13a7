"""The latent path end to end in small: latents of digits, a guided DiT, samples that are images again."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from running import comparable_metrics, guided_latent_changes, tiny_config

from eval.scoring import classifier
from eval.scoring.score import preflight
from meanflow.data import batch_indices, open_latents
from meanflow.data.codec import SpaceToDepth
from meanflow.data.dataset import digits
from meanflow.data.prepare_latents import prepare
from meanflow.errors import AssetError, ConfigError
from meanflow.random import generator
from meanflow.training.batches import BatchStream
from meanflow.training.checkpoint import load_newest
from meanflow.training.model import generate, load, noise
from meanflow.training.processes import DistributedContext
from meanflow.training.state import HostCopy

CPU = torch.device("cpu")


@pytest.fixture
def changes(tmp_path):
    return guided_latent_changes(tmp_path / "latents")


@pytest.fixture
def latents(tmp_path, changes):
    config = tiny_config(**changes)
    prepare(config.data, 0, 1, CPU)
    return open_latents(tmp_path / "latents", config.data)


@pytest.fixture
def batches(latents, changes):
    def batches(step=0, world=1, rank=0, **others):
        stream = BatchStream(latents, tiny_config(**changes, **others), DistributedContext(rank, world, CPU))
        return list(stream.micro_batches(step))

    return batches


def newest(run):
    return load_newest(run.checkpoints)[1]


# --- batches -----------------------------------------------------------------------------------------------------


def test_a_batch_is_the_posterior_of_the_images_in_order(latents, batches):
    """x = scale (mean + std·noise), of the mirror image on a fair coin."""
    (batch,) = batches(step=3)
    indices = batch_indices(len(latents), 3, 3 * 8, 8)
    mirror = torch.rand(8, generator=generator(3, "mirror", 3)) < 0.5
    assert mirror.any() and not mirror.all()
    mean, _ = latents.read(indices, mirror)  # space-to-depth has no spread
    rows = [int((batch.x - x).abs().flatten(1).amax(1).argmin()) for x in mean.float()]
    assert sorted(rows) == list(range(8))
    assert torch.equal(batch.x[rows], mean.float())
    assert torch.equal(batch.cond["class_labels"][rows], latents.labels[indices])


def test_the_posterior_has_the_spread_that_was_stored(latents, batches, monkeypatch):
    monkeypatch.setattr(latents, "scale", 0.5)
    read = lambda i, mirror: (torch.full((len(i), 4, 4, 4), value).half() for value in (1.0, 2.0))  # noqa: E731
    monkeypatch.setattr(latents, "read", read)
    (batch,) = batches(train__batch=512)
    assert batch.x.mean() == pytest.approx(0.5, abs=0.02) and batch.x.std() == pytest.approx(1.0, rel=0.02)
    assert not torch.equal(batch.x, batches(step=1, train__batch=512)[0].x)


def test_processes_and_micro_batches_see_the_same_samples(batches):
    (whole,) = batches()
    parts = [b for rank in (0, 1) for b in batches(world=2, rank=rank, train__microbatch=2)]
    for field in ("x", "eps", "t", "r", "unconditional"):
        joined = torch.cat([getattr(part, field) for part in parts])
        one, many = (y.double().reshape(8, -1) for y in (getattr(whole, field), joined))
        one, many = (y[torch.argsort(y.sum(1), stable=True)] for y in (one, many))
        assert torch.equal(one, many), field


def test_steps_may_be_taken_in_any_order(latents, changes):
    """What was read ahead is used for its own step alone."""
    stream = BatchStream(latents, tiny_config(**changes), DistributedContext(0, 1, CPU))
    forward = [next(stream.micro_batches(step)).x for step in range(3)]
    assert torch.equal(next(stream.micro_batches(1)).x, forward[1])
    assert torch.equal(next(stream.micro_batches(0)).x, forward[0])


# --- runs --------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_resumes_bit_equal(train_tiny, changes):
    changes |= {"guidance__omega_prime": 2.0, "guidance__kappa": 0.5}
    whole = train_tiny("whole", train__steps=6, **changes)
    train_tiny("parts", train__steps=3, **changes)
    parts = train_tiny("parts", train__steps=6, **changes)
    a, b = newest(whole), newest(parts)
    for name in a.model:
        assert torch.equal(a.model[name], b.model[name]), name
        assert torch.equal(a.ema["0.9"][name], b.ema["0.9"][name]), name
    assert comparable_metrics(whole.path) == comparable_metrics(parts.path)


@pytest.mark.parametrize("backbone", ["unet", "dit"])
def test_activation_checkpointing_changes_nothing_but_memory(train_tiny, changes, backbone):
    model = changes if backbone == "dit" else {"model__dropout": 0.3, "model__attention": [8]}
    a = newest(train_tiny("plain", **model)).model
    for how in ("cheap", "blocks"):
        b = newest(train_tiny(how, **model, train__activation_checkpointing=how)).model
        for name in a:
            assert torch.equal(a[name], b[name]), (how, name)


def test_averages_on_the_host_are_the_same_and_copied_only_when_due(train_tiny, changes, monkeypatch):
    copies, copy = [], HostCopy.copy
    monkeypatch.setattr(HostCopy, "copy", lambda self, then: copies.append(1) or copy(self, then))
    every = {"ema__every": 3, "train__steps": 7, **changes}
    a, b = (newest(train_tiny(store, ema__store=store, **every)).ema["0.9"] for store in ("device", "host"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert len(copies) == 2


def test_the_device_waits_for_the_copy_before_the_weights_change(monkeypatch):
    """A stand-in for the stream: what is asked of it, in order. Not run on a GPU."""
    asked, x = [], torch.ones(3)
    stream = SimpleNamespace(device=None, wait_stream=lambda s: asked.append("after the step"))
    event = SimpleNamespace(synchronize=lambda: asked.append("host"))
    stream.record_event = lambda: asked.append("copied") or event
    host = HostCopy([x])
    host.stream = stream
    current = SimpleNamespace(wait_event=lambda e: asked.append("device"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext())
    seen = []
    host.copy(then=lambda copies: seen.extend(y.clone() for y in copies))
    host.wait()
    host.before_weights_change()
    assert asked == ["after the step", "copied", "host", "device"] and torch.equal(seen[0], x)


def test_the_home_folder_is_expanded(train_tiny, tmp_path, monkeypatch):
    """At use: the settings keep what was written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    run = train_tiny(**guided_latent_changes("~/latents"), train__steps=1)
    assert (tmp_path / "latents" / "manifest.json").exists() and "latents: ~/latents" in run.config_file.read_text()


@pytest.mark.parametrize("model, match", [({"image_size": 8}, "image_size"), ({"classes": 7}, r"model\.classes=10")])
def test_a_network_that_does_not_fit_is_named_before_anything_is_encoded(train_tiny, changes, tmp_path, model, match):
    changes["model"] |= model
    with pytest.raises(ConfigError, match=match):
        train_tiny(**changes)
    assert not (tmp_path / "latents").exists()


# --- samples and scores ------------------------------------------------------------------------------------------


def test_samples_are_decoded(train_tiny, changes):
    model, labels = load(train_tiny(**changes).path, device=CPU), torch.arange(4)
    images = generate(model, 0, 4, 1, 7, labels)
    assert images.shape == (4, 1, 8, 8)
    z = noise(7, 0, 4, (4, 4, 4))
    with torch.no_grad():
        latent = z - model.network(z, torch.zeros(4), torch.ones(4), labels)
    assert torch.allclose(images, SpaceToDepth(CPU).decode(latent), atol=1e-6)


def test_without_its_vae_a_run_is_not_sampled(train_tiny, changes, tmp_path):
    path = load_newest(train_tiny(**changes).checkpoints)[0]
    content = torch.load(path, weights_only=True)
    meta = json.loads(content["meta"])
    meta["config"]["data"]["vae"] = str(tmp_path / "nowhere")
    torch.save({**content, "meta": json.dumps(meta)}, tmp_path / "other.pt")
    with pytest.raises(AssetError, match="vae"):
        load(tmp_path / "other.pt", device=CPU)


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


def test_the_classifiers_accuracy(train_tiny, changes, monkeypatch):
    model, real = load(train_tiny(**changes).path, device=CPU), digits("train")
    found = classifier.classifier_accuracy(model, 200, 1)
    assert 0 <= found.accuracy < 0.5 and 0.95 < found.real < 1  # six steps teach nothing

    def ideal(model, start, stop, steps, seed, labels):
        rows = [int((real.labels == label).nonzero()[k % 100]) for k, label in enumerate(labels)]
        return real.images[rows].float() / 127.5 - 1

    monkeypatch.setattr(classifier, "generate", ideal)
    assert classifier.classifier_accuracy(model, 200, 1).accuracy > 0.99


# --- fine-tuning -------------------------------------------------------------------------------------------------


def test_init_takes_the_average_of_another_run(train_tiny, changes):
    source = train_tiny("source", **changes)
    before = newest(source)
    tuned = train_tiny("tuned", **changes, init__from=str(source.path), train__steps=1, optim__lr=1e-12)
    after = newest(tuned)
    for name, weight in before.ema["0.9"].items():
        assert torch.allclose(after.model[name], weight, atol=1e-9), name
        assert torch.allclose(after.ema["0.9"][name], weight, atol=1e-9), name
    listed = json.loads((tuned.path / "init.json").read_text())
    assert len(listed["taken"]) == len(before.model) and not listed["fresh"] and listed["step"] == 6


def test_init_lists_what_does_not_fit(train_tiny, changes, tmp_path):
    source = train_tiny("source", **changes)
    changes["model"] |= {"conditioning": "t,r", "depth": 3}
    tuned = train_tiny("tuned", **changes, init__from=str(source.path))
    listed = json.loads((tuned.path / "init.json").read_text())
    assert any(name.startswith("blocks.2.") for name in listed["fresh"])
    assert any(name.startswith("time_embed.r.") for name in listed["fresh"])
    assert all(name.startswith("time_embed.t-r.") for name in listed["unused"]) and listed["unused"]
    source.path.rename(tmp_path / "gone")  # needed only to begin
    assert load_newest(train_tiny("tuned", **changes, init__from=str(source.path), train__steps=8).checkpoints)[0]


@pytest.mark.parametrize(
    ("init", "network", "error", "word"),
    [
        ({"init__from": "nowhere"}, "dit", AssetError, "nowhere"),
        ({"init__ema": 0.5}, "dit", ConfigError, "init.ema"),
        ({}, "unet", ConfigError, "another network"),
    ],
)
def test_init_refuses_what_it_cannot_use(train_tiny, changes, init, network, error, word):
    source = train_tiny("source", **changes)
    init = {"init__from": str(source.path), **init}
    with pytest.raises(error, match=word):
        train_tiny("tuned", **(changes if network == "dit" else {}), **init)
