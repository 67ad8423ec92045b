"""Coverage and widths of intervals for means, counted on made-up draws."""

import torch

from benchmarks import mean


def test_a_summary_counts_draws_and_columns():
    truth = torch.zeros(2)
    ours = [torch.tensor([[0.0, 0.5], [1.0, width]]) for width in (1.0, 1.0, 1.0, 0.4)]
    sampling = [torch.tensor([[0.0, 0.0], [2.0, 2.0]]) for _ in range(4)]
    found = mean.summary(list(zip(ours, sampling, strict=True)), truth)
    assert found["ours"]["covered"][0] == 0.875
    assert found["ours"]["worst column"] == 0.75
    assert found["sampling"]["covered"][0] == found["sampling"]["worst column"] == 1.0
    assert found["width over sampling's"] == 0.4625  # the mean of 1 / 2 and .85 / 2


def test_a_column_stops_at_the_first_look_that_is_narrow():
    """The widths fall by one at each look; the value of one of two draws is off at the last."""
    paths = torch.zeros(2, 8, 4, 2, 1)
    paths[:, :, :, 1] = torch.arange(8.0, 0.0, -1)[:, None, None]
    paths[0, -1, :, 0] = 1.5
    found = mean.ended(paths, torch.zeros(1))["ours"]
    assert found["stopped"][0] == 1.0  # no target is that of the last look
    assert found["at every look"][0] == 0.5
    paths[0, 4, :, 0] = 9.0
    assert mean.ended(paths, torch.zeros(1))["ours"]["stopped"][0] == 0.9


def test_draws_take_known_numbers_through_the_code_of_the_wrapper():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, generator=generator)
    y = x.sin().double()
    (order,) = mean.orders(len(x), 1)
    value, half = mean.looks_at(x, y, order).look(120)[0]
    assert ((value - y.mean(0)).abs() <= 2 * half).all()
    looks = mean.looks_at(x, y, order)
    assert [mean.given(looks, each).look(60)[0].shape[1] for each in (y, y[:, :1])] == [2, 1]
    cheap = mean.looks_at(x, y + torch.randn(300, 2, generator=generator), order, y.float())
    assert (cheap.look(120)[0][1] > half).all()


def test_coordinates_do_not_tell_computed_rows_from_others():
    """With many features, rows that determine the coordinates lie farther out than others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 400, generator=generator)
    x[:, 0] += 20 * torch.rand(300, generator=generator) ** 4
    y = x.square().sum(1, keepdim=True).double()
    off = []
    for order in mean.orders(len(x), 40):
        value, half = mean.looks_at(x, y, order).look(120)[0]
        off.append((value - y.mean(0)) / half)
    off = torch.cat(off)
    assert float(off.mean().abs()) < 0.25  # three standard errors of 40 draws
    assert float((off.abs() <= 1).double().mean()) >= 0.85
