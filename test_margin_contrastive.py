"""Each claim of margin_contrastive.py against something independent: autograd through the textbook
formula, a slow numpy loop, torchvision's operations, brute force. No network; one test for a GPU.
"""

import csv
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision import datasets

import margin_contrastive as mc
from margin_contrastive import Config

PROGRAM = Path(mc.__file__)
# a run of seconds
TINY = Config(device="cpu", max_images=240, epochs=3, batch_size=40, attenuation=0.0)
SWITCHES = list(itertools.product((0.0, 1.0), repeat=3))  # of E, D, A
FACTORS = ("emphasis", "deemphasis", "attenuation")


# ---- 1. Loss -------------------------------------------------------------------------------------
def pairs(n, dim, low=0.001, high=3.14):
    """N pairs of embeddings of different lengths, at angles spread over [low, high]."""
    torch.manual_seed(0)
    plane = torch.linalg.qr(torch.randn(n, dim, 2, dtype=torch.float64)).Q
    angle = torch.linspace(low, high, n, dtype=torch.float64)[:, None]
    first, second = plane.unbind(2)
    z1 = (0.5 + angle) * first
    z2 = 3 * (angle.cos() * first + angle.sin() * second)
    return [z1.requires_grad_(), z2.requires_grad_()]


def textbook_margin_loss(z1, z2, *, temperature, margin, subtractive_margin=0.0):
    """The ordinary way: the margin in the positive's logit, and autograd."""
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]))
    partner = z.roll(n, 0)
    # half the angle in the rhombus of z and partner; arccos loses its digits near 0 and pi
    theta = 2 * torch.atan2((z - partner).norm(dim=1), (z + partner).norm(dim=1))
    positive = torch.cos((theta + margin).clamp(max=math.pi)) - subtractive_margin
    target = torch.arange(2 * n).roll(n)
    cosines = (z @ z.T).fill_diagonal_(-torch.inf)
    cosines = cosines.scatter(1, target[:, None], positive[:, None])
    return F.cross_entropy(cosines / temperature, target)


def gradients(loss, z, **settings):
    return torch.autograd.grad(loss(*z, **settings), z)


def relative_error(result, reference):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(result, reference))


def slow_gradients(z1, z2, strengths, temperature, margin, subtractive_margin, positive_scale):
    """The scaled gradient by definition, for every anchor and every other view, with numpy."""
    emphasis, deemphasis, attenuation = strengths
    z = np.concatenate([z1, z2])
    count = len(z)
    length = np.linalg.norm(z, axis=1)
    y = z / length[:, None]
    gradient = np.zeros_like(z)
    for i in range(count):
        j = (i + count // 2) % count
        apart = np.linalg.norm(y[i] - y[j])
        together = np.linalg.norm(y[i] + y[j])
        theta = 2 * math.atan2(apart, together)
        moved = min(theta + margin, math.pi)
        negatives = [k for k in range(count) if k not in (i, j)]
        shares = {k: math.exp(y[i] @ y[k] / temperature) for k in negatives}
        wrong = sum(shares.values())
        plain = wrong / (wrong + math.exp(math.cos(theta) / temperature))  # 1 - p
        positive = math.cos(moved) - subtractive_margin
        with_margin = wrong / (wrong + math.exp(positive / temperature))
        g = math.sin(moved) / math.sin(theta) if moved < math.pi else 0.0
        shares[j] = -wrong * positive_scale * max(g, 1.0) ** emphasis * min(g, 1.0) ** deemphasis
        anchor = (with_margin / plain) ** attenuation * plain
        for k, share in shares.items():
            weight = anchor * share / wrong / temperature / count
            for a, b in ((i, k), (k, i)):  # d cos(a, b) / d z_a
                gradient[a] += weight * (y[b] - (y[i] @ y[k]) * y[a]) / length[a]
    return np.split(gradient, 2)


@pytest.mark.parametrize("strengths", [*SWITCHES, (0.5, 2.0, 3.0), (2.0, 0.5, 0.25)])
def test_every_combination_of_strengths_is_the_definition(strengths):
    cases = [
        (0.3, 0.0, 0.2, 1.0),
        (1.2, 0.2, 0.1, 1.7),
        (0.0, 0.4, 0.5, 0.6),
    ]
    for margin, m2, tau, s in cases:
        z = pairs(6, 5, 0.1, 3.0)
        settings = dict(temperature=tau, margin=margin, subtractive_margin=m2, positive_scale=s)
        expected = slow_gradients(*[x.detach().numpy() for x in z], strengths, **settings)
        settings |= dict(zip(FACTORS, strengths))
        result = gradients(mc.margin_contrastive_loss, z, **settings)
        assert relative_error(result, [torch.from_numpy(x) for x in expected]) < 1e-10


@pytest.mark.parametrize("margin", [0.0, 0.2, 1.5, 3.0])
def test_all_on_is_the_textbook_margin_loss_and_all_off_and_the_value_nt_xent(margin):
    loss = mc.margin_contrastive_loss
    for tau, m2 in ((0.05, 0.0), (0.2, 0.3), (1.0, 0.0)):
        for low, high in ((0.001, 3.14), (0.01, 0.5), (2.5, 3.14)):
            z = pairs(16, 8, low, high)
            settings = dict(temperature=tau, margin=margin, subtractive_margin=m2)
            expected = gradients(textbook_margin_loss, z, **settings)
            # sin(theta) is the root of 1 - c**2: rounding c by eps moves it by eps / sin**2 of it
            smallest = min(math.sin(low), math.sin(high))
            bound = 4 * torch.finfo(torch.float64).eps / smallest**2
            assert relative_error(gradients(loss, z, **settings), expected) < bound + 1e-12
            nt_xent = functools.partial(textbook_margin_loss, temperature=tau, margin=0.0)
            off = gradients(loss, z, **settings, **mc.OFF)
            assert relative_error(off, gradients(nt_xent, z)) < 1e-12
            value = loss(*z, **settings, emphasis=0.3, deemphasis=2, attenuation=0.5)
            assert value.item() == pytest.approx(nt_xent(*z).item(), rel=1e-10)


def test_others_may_come_from_a_queue_which_may_have_no_negative_for_some_anchors():
    """MoCo's InfoNCE with false negatives masked out, a margin in its logit and autograd."""
    q, k = pairs(12, 8, 0.1, 1.9)
    c = F.cosine_similarity(q, k)
    queue = F.normalize(torch.randn(30, 8, dtype=torch.float64))
    masked = torch.rand(12, 30) < 0.3
    masked[::4] = True  # all of them
    negatives = (F.normalize(q) @ queue.T).masked_fill(masked, -torch.inf)
    others = (negatives / 0.2).logsumexp(1)
    for margin in (1.2, 0.0):
        expected = margin_in_the_logit(c, negatives, margin=margin)  # 0 where all are masked
        loss = mc.margin_loss(c.view(3, 4), others.view(3, 4), margin=margin)
        two = [torch.autograd.grad(x, (q, k), retain_graph=True) for x in (loss, expected)]
        assert relative_error(*two) < 1e-10
    for margin, m2, strength in itertools.product((0, 1.2), (0, 1000), (0, 1, 4)):
        strengths = dict.fromkeys(FACTORS, strength)
        loss = mc.margin_loss(c, others, margin=margin, subtractive_margin=m2, **strengths)
        assert loss.item() == pytest.approx(expected.item())  # NT-Xent's
        for gradient in torch.autograd.grad(loss, (q, k), retain_graph=True):
            assert gradient.isfinite().all()
            assert (gradient[::4] == 0).all()


@pytest.mark.parametrize("tau", [1e-3, 0.2, 1e3])
def test_degenerate_embeddings_have_finite_gradients_at_any_setting(tau):
    z1 = torch.randn(4, 8)
    some = torch.tensor([[1], [0], [1], [0]]) * z1
    one = z1[:1].expand(4, -1)
    cases = [
        (z1, z1),
        (z1, -z1),
        (one, one),
        (some, z1),
        (0 * z1, 0 * z1),
        (z1 / 1e20, 1e15 * z1),
    ]
    for case, margin, strength in itertools.product(cases, (0, 0.2, 3.1), (0, 1, 4)):
        z = [x.clone().requires_grad_() for x in case]
        settings = dict.fromkeys(FACTORS, strength) | dict(margin=margin, subtractive_margin=2.0)
        result = gradients(mc.margin_contrastive_loss, z, temperature=tau, **settings)
        assert all(gradient.isfinite().all() for gradient in result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_under_autocast(dtype):
    z = [x.detach().to(dtype).requires_grad_() for x in pairs(16, 32, 0.3, 2.0)]
    exact = [x.detach().double().requires_grad_() for x in z]
    with torch.autocast("cpu", torch.bfloat16):
        loss = mc.margin_contrastive_loss(*z)
    assert loss.item() == pytest.approx(mc.margin_contrastive_loss(*exact).item(), rel=1e-5)
    reference = gradients(mc.margin_contrastive_loss, exact)
    assert relative_error(torch.autograd.grad(loss, z), reference) < torch.finfo(dtype).eps
    assert mc.margin_loss(*torch.zeros(2, 4, dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize("name", mc.LOSS_SETTINGS)
def test_a_setting_out_of_range_or_to_be_learned_is_named_with_its_value(name):
    from_terms = functools.partial(mc.margin_loss, *torch.ones(2, 4))
    from_pairs = functools.partial(mc.margin_contrastive_loss, *torch.ones(2, 4, 3))
    edge = {"temperature": 0.0, "margin": math.pi, "positive_scale": 0.0}.get(name, 1e7)
    numbers = [edge, -0.1, math.nan, math.inf]
    tensors = [torch.tensor(0.2), torch.nn.Parameter(torch.tensor(0.2))]
    cases = list(itertools.product([from_terms, from_pairs], numbers + tensors))
    for function, value in cases + [(Config, number) for number in numbers]:
        with pytest.raises(ValueError, match=f"{name} must be .*{re.escape(repr(value))}"):
            function(**{name: value})


@pytest.mark.parametrize("wrong", [(8, 1), (7,)])
def test_unlike_shapes_are_named_instead_of_broadcast(wrong):
    y = torch.ones(8)
    h = torch.ones(8, 3)
    other = torch.ones(wrong)
    calls = [(mc.margin_loss, y, other), (mc.margin_contrastive_loss, h, other)]
    for classify in (mc.linear_probe, mc.knn):  # training labels, test labels
        calls += [(classify, h, other, h, y), (classify, h, y, h, other)]
    for function, *tensors in calls:
        with pytest.raises(ValueError, match=re.escape(str(wrong))):
            function(*tensors)


# ---- 2. Views ------------------------------------------------------------------------------------
IMAGES = torch.rand(24, 3, 32, 40, generator=torch.Generator().manual_seed(0))


def test_crop_and_flip_are_torchvisions():
    torch.manual_seed(0)
    height = torch.randint(5, 33, (24,))
    width = torch.randint(5, 41, (24,))
    top = (torch.rand(24) * (33 - height)).long()
    left = (torch.rand(24) * (41 - width)).long()
    flip = torch.rand(24) < 0.5
    box = dict(top=top, left=left, height=height, width=width)
    columns = {name: values.view(24, 1, 1) for name, values in box.items()}
    result = mc.crop_and_flip(IMAGES, **columns, flip=flip.view(24, 1, 1))
    for i, image in enumerate(IMAGES):
        numbers = [int(values[i]) for values in box.values()]
        expected = TF.resized_crop(image, *numbers, [32, 40], antialias=True)
        if flip[i]:
            expected = TF.hflip(expected)
        assert (result[i] - expected).abs().max() < 1e-4


def test_colours_change_as_torchvisions_in_the_order_of_the_arguments():
    images = 0.4 + 0.2 * IMAGES  # to stay in [0, 1] at each step: ours are clamped once
    names = ("brightness", "contrast", "saturation", "hue")
    factors = torch.empty(24, 4).uniform_(0.7, 1.3)
    # a third of a turn, where two ways to turn a hue agree
    factors[:, 3] = torch.tensor([-1 / 3, 0, 1 / 3]).repeat(8)
    to_grey = torch.arange(24) % 5 == 0
    changes = dict(zip(names, factors.T.reshape(4, 24, 1, 1)))
    result = mc.jitter_colors(images, **changes, to_grey=to_grey.view(24, 1, 1))
    for i, image in enumerate(images):
        for name, factor in zip(names, factors[i]):
            image = getattr(TF, f"adjust_{name}")(image, float(factor))
        expected = TF.rgb_to_grayscale(image, 3) if to_grey[i] else image
        assert (result[i] - expected).abs().max() < 1e-4


def test_augment_draws_for_each_image_as_it_says(monkeypatch):
    """Against numpy's draws; a side that is too long is cut, where torchvision draws again."""
    n = 20000
    drawn = {}
    for function in ("crop_and_flip", "jitter_colors"):
        monkeypatch.setattr(mc, function, lambda images, **draws: drawn.update(draws) or images)
    mc.augment(torch.zeros(1, 3, 60, 80).expand(n, -1, -1, -1), crop_min=0.3)
    uniform = np.random.default_rng(0).uniform
    area = 4800 * uniform(0.3, 1, n)
    aspect = np.exp(uniform(np.log(3 / 4), np.log(4 / 3), n))
    height = np.minimum(np.sqrt(area / aspect), 60)
    width = np.minimum(np.sqrt(area * aspect), 80)
    strength = 0.5 * (uniform(0, 1, n) < 0.8)  # for all four colour amounts
    expected = {
        "top": uniform(0, 1, n) * (60 - height),
        "left": uniform(0, 1, n) * (80 - width),
        "height": height,
        "width": width,
        "flip": uniform(0, 1, n) < 0.5,
        "brightness": 1 + 0.8 * strength * uniform(-1, 1, n),
        "contrast": 1 + 0.8 * strength * uniform(-1, 1, n),
        "saturation": 1 + 0.8 * strength * uniform(-1, 1, n),
        "hue": 0.2 * strength * uniform(-1, 1, n),
        "to_grey": uniform(0, 1, n) < 0.1,
    }
    result = np.stack([drawn[name].flatten().double().numpy() for name in expected])
    expected = np.stack([x.astype(float) for x in expected.values()])
    shares = np.arange(0.025, 1, 0.05)
    difference = np.quantile(result, shares, 1) - np.quantile(expected, shares, 1)
    assert (np.abs(difference).max(0) < 0.03 * np.ptp(expected, 1)).all()
    # no draw is used twice, and the four colour amounts are off together
    assert np.abs(np.corrcoef(result) - np.corrcoef(expected)).max() < 0.04
    assert abs((result[5:9] == [[1], [1], [1], [0]]).all(0).mean() - 0.2) < 0.02


def test_no_padding_is_asked_for_or_needed(monkeypatch):
    """PyTorch before 2.13 has no border padding on Apple's GPUs."""
    sample = mock.Mock(wraps=F.grid_sample)
    monkeypatch.setattr(F, "grid_sample", sample)
    images = IMAGES.repeat(20, 1, 1, 1).to(memory_format=torch.channels_last)
    mc.augment(images, crop_min=0.05)
    images, grid = sample.call_args.args
    pixel = ((grid + 1) * torch.tensor([40, 32]) - 1) / 2
    assert pixel.min() > -1e-4
    assert (pixel < torch.tensor([39.0001, 31.0001])).all()
    assert sample.call_args.kwargs == {"align_corners": False}
    assert images.is_contiguous()


# ---- 3. Encoder ----------------------------------------------------------------------------------
@pytest.mark.parametrize("encoder, features", [("small", 192), ("resnet18", 512)])
def test_features_have_their_size_and_embeddings_are_standardised(encoder, features):
    h, z = mc.Model(encoder).train()(IMAGES[:, :, :, :32])
    assert h.shape == (24, features)
    assert z.shape == (24, 128)
    assert z.mean(0).abs().max() < 1e-5
    assert (z.var(0, correction=0) - 1).abs().max() < 0.01


# ---- 4. Training ---------------------------------------------------------------------------------
def test_what_is_measured_is_what_autograd_says():
    """A is the ratio of d loss / d others with margin and without, A E D of d loss / d theta."""
    theta = torch.linspace(0.1, 3, 40, dtype=torch.float64).requires_grad_()
    others = torch.linspace(-3, 8, 40, dtype=torch.float64).requires_grad_()
    slopes = []
    for positive in (theta.cos(), (theta + 0.8).clamp(max=math.pi).cos() - 0.1):
        loss = F.softplus(others - positive / 0.3)
        slopes.append(torch.autograd.grad(loss.sum(), (theta, others)))
    (pull, push), (pull_with_margin, push_with_margin) = slopes
    A = push_with_margin / push
    g = pull_with_margin / pull / A
    E = torch.where(theta < (math.pi - 0.8) / 2, g, 1)
    D = torch.where(theta < (math.pi - 0.8) / 2, 1, g)
    config = Config(temperature=0.3, margin=0.8, subtractive_margin=0.1)
    measured = mc.measure(theta.cos(), others, config)
    loss = F.softplus(others - theta.cos() / 0.3)
    expected = [loss, theta.rad2deg(), E, D, A, E.log(), D.log().clamp(min=-5), A.log()]
    assert list(measured) == mc.MEANS
    for value, reference in zip(measured.values(), expected):
        assert torch.allclose(value, reference, atol=1e-8)
        assert not value.requires_grad


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_three_epochs_on_few_letters_end_well_above_the_untrained_encoder(tmp_path, device):
    config = replace(TINY, device=device, max_images=3000, batch_size=32, out=tmp_path)
    for probed in mc.run(config, verbose=False)["probes"]:  # seen and unseen
        assert probed["linear"] > probed["random_linear"] + 15


def test_the_optimizer_has_simclrs_momentum_and_weight_decay():
    """Two steps by hand on a constant gradient."""
    model, optimizer = mc.build(TINY)
    optimizer.param_groups[0]["lr"] = 0.1
    for parameter in model.parameters():
        parameter.data.fill_(1)
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    optimizer.step()
    first = 0.01 + 5e-4
    second = 0.9 * first + 0.01 + 5e-4 * (1 - 0.1 * first)
    expected = torch.tensor(1 - 0.1 * (first + second))
    assert all(torch.allclose(parameter, expected) for parameter in model.parameters())


class Network(torch.nn.Linear):
    """In place of a Model: keeps the views that it is given, and has embeddings that differ."""

    def __init__(self):
        super().__init__(3072, 8)
        self.views = []

    def forward(self, views):
        assert self.training
        self.views.append(views.detach())
        z = super().forward(views.flatten(1) - 0.5)
        self.dtype = z.dtype
        return None, z


def train_network(config, images, epochs=1):
    torch.manual_seed(0)
    network = Network().eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    for epoch in range(epochs):
        mc.train_epoch(network, optimizer, images, epoch, config)
    return network


def test_an_epoch_is_every_image_once_in_two_views_of_the_configs_settings(monkeypatch):
    images, _ = mc.load_data(TINY)
    augment = mock.Mock(side_effect=lambda images, **_: images)
    monkeypatch.setattr(mc, "augment", augment)
    settings = dict(crop_min=0.7, gray_prob=0.15, flip=True)
    config = replace(TINY, **settings)
    network = train_network(config, images, epochs=2)
    other_seed = train_network(replace(config, seed=1), images)
    assert all(call.kwargs == settings for call in augment.call_args_list)
    expected = {(image / 255).numpy().tobytes() for image in images}
    for seen in torch.stack(network.views).view(2, 6, 80, -1):
        assert torch.equal(seen[:, :40], seen[:, 40:])  # two views of each
        assert {image.numpy().tobytes() for image in seen.flatten(0, 1)} == expected
    assert not torch.equal(network.views[0], network.views[6])  # in another order
    assert not torch.equal(network.views[0], other_seed.views[0])


def test_a_step_follows_the_gradient_of_the_loss_at_all_of_the_configs_settings(monkeypatch):
    monkeypatch.setattr(mc, "augment", lambda images, **_: images)
    settings = dict(temperature=0.3, margin=0.9, subtractive_margin=0.1, positive_scale=0.6)
    settings |= dict(emphasis=0.5, deemphasis=2.0, attenuation=3.0)
    config = replace(TINY, **settings)
    images, _ = mc.load_data(TINY)
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    measured = mc.train_step(network, optimizer, images[:8], config)
    _, z = network(images[:8].repeat(2, 1, 1, 1) / 255)
    loss = mc.margin_contrastive_loss(*z.chunk(2), **settings)
    expected = torch.autograd.grad(loss, list(network.parameters()))
    assert relative_error([p.grad for p in network.parameters()], expected) < 1e-5
    terms = mc.pair_terms(*z.chunk(2), temperature=0.3)
    for name, value in mc.measure(*terms, config).items():
        assert torch.allclose(value, measured[name], atol=1e-5)


def test_all_views_of_an_image_differ():
    """Of one batch, of another epoch and of another seed."""
    images = mc.load_data(TINY)[0][:1].expand(40, -1, -1, -1)
    views = train_network(TINY, images, epochs=2).views
    views += train_network(replace(TINY, seed=1), images).views
    assert len({view.numpy().tobytes() for view in torch.cat(views)}) == 3 * 80


def test_bfloat16_is_used_where_a_card_computes_in_it(monkeypatch):
    images, _ = mc.load_data(TINY)
    assert train_network(TINY, images).dtype == torch.float32
    monkeypatch.setattr(mc, "has_bfloat16", lambda device: True)
    assert train_network(TINY, images).dtype == torch.bfloat16
    monkeypatch.undo()
    supported = mock.Mock()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert mc.has_bfloat16(torch.device("cuda")) is supported.return_value
    supported.assert_called_with(including_emulation=False)  # a T4 emulates it
    assert not mc.has_bfloat16(torch.device("cpu"))


def test_a_step_never_reads_a_value_back_from_the_device(monkeypatch):
    """On the meta device, where to read a value raises, and so does a tensor left on the CPU."""
    monkeypatch.setattr(torch, "autocast", mock.MagicMock())  # which knows no meta device
    model, optimizer = mc.build(replace(TINY, device="meta"))
    images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="meta")
    measured = mc.train_step(model, optimizer, images, TINY)
    assert all(value.device.type == "meta" for value in measured.values())


def test_the_rate_rises_for_a_tenth_and_falls_as_a_cosine(monkeypatch):
    rates = []

    def record(model, optimizer, images, config):
        rates.append(optimizer.param_groups[0]["lr"])
        return {"loss": torch.zeros(1)}

    monkeypatch.setattr(mc, "train_step", record)
    train_network(replace(TINY, epochs=5, lr=0.3), mc.load_data(TINY)[0], epochs=5)
    time = (np.arange(30) + 0.5) / 30
    fall = (1 + np.cos(np.pi * (time - 0.1) / 0.9)) / 2
    assert rates == pytest.approx(0.3 * 40 / 256 * np.where(time < 0.1, time / 0.1, fall))


# ---- 5. Probes -----------------------------------------------------------------------------------
def test_probing_leaves_the_encoder_as_it_was_and_tells_of_one_that_diverged():
    model = mc.Model("small").train()
    train = mc.glyphs("AB", 40, 0)
    test = mc.glyphs("AB", 30, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accuracies = mc.probe(model, train, test)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    h, h_test = [model.eval()(images / 255)[0].detach() for images, _ in (train, test)]
    data = (h, train[1], h_test, test[1])
    assert accuracies == pytest.approx((mc.linear_probe(*data), mc.knn(*data)))
    model.encoder[0].weight.data *= math.nan
    with pytest.raises(FloatingPointError, match="--lr"):
        mc.probe(model, train, test)


def blobs(count, seed):
    """Features in three overlapping classes, the first one the commonest, and their labels."""
    y = (torch.arange(count) % 20 - 17).clamp(min=0)
    noise = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))
    return 5 + 1.5 * F.one_hot(y, 10) + noise, y


def test_the_linear_probe_is_at_the_optimum_and_its_biases_are_free():
    """Gradient descent on the same problem, with numpy, ends at the same predictions."""
    h, y = blobs(300, 0)
    h_test, y_test = blobs(10000, 1)
    x, x_test = [((part - h.mean(0)) / h.std(0)).double().numpy() for part in (h, h_test)]
    weights = np.zeros((10, 3))
    bias = np.zeros(3)
    for _ in range(3000):
        p = np.exp(x @ weights + bias)
        residual = (p / p.sum(1, keepdims=True) - np.eye(3)[y]) / len(x)
        weights -= x.T @ residual + 0.01 * weights
        bias -= residual.sum(0)
    guesses = (x_test @ weights + bias).argmax(1)
    for labels in (torch.zeros(10000), torch.ones(10000), y_test):
        expected = 100 * (guesses == labels.numpy()).mean()
        assert mc.linear_probe(h, y, h_test, labels) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("classify", [mc.linear_probe, mc.knn])
def test_no_probe_learns_from_the_test_images(classify):
    h, y = blobs(400, 0)
    h_test, y_test = blobs(100, 1)
    h_test[0] *= 1e4  # would spoil any statistics that it entered
    first = classify(h, y, h_test[:1], y_test[:1])
    others = classify(h, y, h_test[1:], y_test[1:])
    assert classify(h, y, h_test, y_test) == pytest.approx(0.01 * first + 0.99 * others)
    shares = [classify(h, y, h_test, torch.full((100,), label)) for label in range(3)]
    assert sum(shares) == pytest.approx(100)  # a guess does not depend on the test's labels


def test_knn_is_brute_force_with_ties_to_the_nearest():
    rng = np.random.default_rng(0)
    h_train = rng.normal(size=(120, 5))
    h_test = rng.normal(size=(200, 5))
    y_train = rng.integers(0, 6, 120)
    y_test = rng.integers(0, 6, 200)
    right = []
    for h, y in zip(h_test, y_test):
        cosine = h_train @ h / np.linalg.norm(h_train, axis=1)
        nearest = y_train[np.argsort(-cosine)[:10]]
        votes = np.bincount(nearest, minlength=6)
        winners = set(np.flatnonzero(votes == votes.max()))
        right.append(next(label for label in nearest if label in winners) == y)
    data = [torch.from_numpy(x) for x in (h_train, y_train, h_test, y_test)]
    assert mc.knn(*data) == pytest.approx(100 * np.mean(right))


# ---- 6. Data -------------------------------------------------------------------------------------
def test_glyphs_are_deterministic_balanced_and_there_to_see():
    images, labels = mc.glyphs("ABCDE", 50, seed=5)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [10] * 5
    assert torch.equal(images, mc.glyphs("ABCDE", 50, 5)[0])
    assert not torch.equal(images, mc.glyphs("ABCDE", 50, 6)[0])
    contrast = images.amax((2, 3)).int() - images.amin((2, 3)).int()
    assert (contrast > 76).all()  # ink in every channel


def test_each_glyph_is_the_labels_character_in_one_of_all_the_fonts(monkeypatch):
    sample = mock.Mock(wraps=F.grid_sample)
    monkeypatch.setattr(F, "grid_sample", sample)
    _, labels = mc.glyphs("AB", 600, seed=0)
    drawn = sample.call_args.args[0]
    stencils = mc.draw_stencils("AB")
    assert len(stencils.unique(dim=0)) == len(mc.FONTS) == 15  # no font is another's double
    matches = (drawn[:, None] == stencils[:, labels].transpose(0, 1)).all(dim=(2, 3, 4))
    assert matches.any(1).all()
    assert (matches.sum(0) > 600 / 15 / 2).all()


def write_folder(root, classes="ab", count=4):
    for split, letter, i in itertools.product(("train", "test"), classes, range(count)):
        (root / split / letter).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (48, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / split / letter / f"{i}.png")


def test_all_pictures_in_a_class_folder_are_read_as_rgb_and_resized(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setenv("HOME" if os.name == "posix" else "USERPROFILE", str(tmp_path.parent))
    deeper = tmp_path / "train" / "a" / "deeper"
    deeper.mkdir()
    (deeper / "notes.txt").touch()
    expected = []
    for mode, path in zip(("L", "P", "CMYK", "RGB"), tmp_path.glob("train/a/*.png")):
        picture = Image.open(path).convert(mode)
        path.unlink()
        picture.save(deeper / f"{mode}.tif")  # which has all of these modes
        picture = TF.pil_to_tensor(picture.convert("RGB"))
        expected.append(TF.resize(picture, [32, 32], antialias=True))
    name = f"folder:~/{tmp_path.name}"
    images, labels = mc.load_images(name, "train")
    distance = (images[labels == 0].float()[:, None] - torch.stack(expected)).abs().amax((2, 3, 4))
    assert (distance <= 1).sum(0).tolist() == (distance <= 1).sum(1).tolist() == [1] * 4
    _, labels = mc.load_images(name, "train", max_images=4)
    assert len(labels) == 4
    assert len(labels.unique()) == 2  # at random, not the first


def test_a_picture_is_upright_and_what_is_transparent_is_white(tmp_path):
    path = tmp_path / "picture.png"
    left = Image.new("RGB", (60, 40), "red")
    left.paste("blue", (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # as a phone has it: turn by 90 degrees clockwise to look at it
    left.save(path, exif=exif)
    picture = mc.read_picture(path)
    assert picture.size == (40, 60)
    assert picture.getpixel((20, 5)) == (0, 0, 255)
    assert picture.getpixel((20, 55)) == (255, 0, 0)
    hidden = Image.new("RGBA", (8, 8), (0, 128, 0, 0))
    hidden.putpixel((3, 3), (10, 20, 30, 255))
    hidden.save(path)
    picture = mc.read_picture(path)
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((3, 3)) == (10, 20, 30)


def test_a_picture_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    cut = tmp_path / "cut.jpg"
    Image.effect_noise((400, 400), 99).save(cut)
    cut.write_bytes(cut.read_bytes()[:9000])
    large = tmp_path / "large.png"
    Image.new("1", (14000, 13500)).save(large)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep)
    for path, says in ((cut, "truncated"), (large, "exceeds limit"), (deep, "8 bits")):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} cannot be read: .*{says}"):
            mc.read_picture(path)


@pytest.mark.parametrize("name", mc.TORCHVISION)
def test_torchvision_sets_are_asked_for_both_splits(monkeypatch, name):
    theirs = getattr(datasets, mc.TORCHVISION[name])
    pictures = [(Image.new("L", (28, 28), 10 * i), i) for i in range(20)]
    stub = mock.create_autospec(theirs, return_value=pictures)
    monkeypatch.setattr(datasets, mc.TORCHVISION[name], stub)
    images, sets = mc.load_data(Config(dataset=name, data_dir=name, batch_size=20))
    splits = [{"train": True}, {"train": False}]
    if name in ("stl10", "svhn"):
        splits = [{"split": "train"}, {"split": "test"}]
    assert stub.call_args_list == [mock.call(name, download=True, **split) for split in splits]
    assert (images == 10 * sets[name][0][1][:, None, None, None]).all()
    assert images.shape[1] == 3


# ---- 7. Settings ---------------------------------------------------------------------------------
def test_settings_are_kept_as_plain_values_that_can_be_stored(tmp_path):
    config = Config(
        batch_size=np.int64(64),
        margin=np.float32(0.2),
        flip=np.False_,
        device=torch.device("cpu"),
        out=Path("x"),
        unseen=["digits"],
    )
    values = vars(config)
    assert {type(value) for value in values.values()} == {str, tuple, int, float, bool}
    assert Config(**json.loads(json.dumps(values))) == config == replace(config, unseen="digits")
    torch.save(values, tmp_path / "values")
    assert torch.load(tmp_path / "values", weights_only=True) == values


def test_a_value_of_another_type_or_a_data_set_that_stands_twice_is_told():
    for name, value in (("batch_size", 64.5), ("epochs", "8"), ("lr", "1"), ("flip", "no")):
        with pytest.raises(ValueError, match=f"{name} .*{value!r}"):
            Config(**{name: value})
    for unseen in (("digits", "digits"), ["glyphs"]):
        with pytest.raises(ValueError, match=f"twice: .*{unseen[0]}"):
            Config(unseen=unseen)


def test_presets_follow_the_data_and_the_encoder():
    assert Config(**mc.preset("glyphs")) == Config()
    assert Config(**mc.preset("cifar10") | {"epochs": 5}).epochs == 5
    assert not mc.preset("svhn")["flip"]
    assert mc.preset("cifar10", "small")["flip"]
    assert mc.preset("cifar10", "resnet18")["batch_size"] == 512


@pytest.mark.parametrize("validation", [False, True])
def test_test_images_are_no_training_images_and_for_validation_unread(monkeypatch, validation):
    draw = mc.glyphs
    read = []
    monkeypatch.setattr(mc, "glyphs", lambda *x: read.append(x[1:]) or draw(*x))
    mc.load_images.cache_clear()
    _, sets = mc.load_data(Config(validation=validation))
    assert ((2000, 1) in read, (2000, 3) in read) == (not validation, not validation)
    for name, (train, test) in sets.items():
        every = mc.load_images(name, "train")
        contents = [{x.numpy().tobytes() for x in images} for images, _ in (train, test, every)]
        assert not contents[0] & contents[1]
        assert (contents[0] | contents[1] == contents[2]) == validation
        assert len(test[1]) == (len(every[1]) // 5 if validation else 2000)


# ---- 8. Runs -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny run from beginning to end, to which interrupted ones are compared."""
    return mc.run(replace(TINY, out=tmp_path_factory.mktemp("finished")), verbose=False)


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def outcome(folder):
    """What a run ends with, interrupted or not: weights, metrics but for the times, accuracies."""
    state = mc.load_checkpoint(folder)
    weights = {name: x.tolist() for name, x in state["model"].items()}
    rows = [row | {"images_per_second": 0} for row in state["history"]]
    probes = json.loads(Path(folder, "results.json").read_text())["probes"]
    return weights, rows, probes


def test_a_run_leaves_what_the_readme_promises(finished):
    folder = Path(finished["folder"])
    names = ["checkpoint.pt", "curves.png", "metrics.csv", "results.json"]
    assert sorted(file.name for file in folder.iterdir()) == names
    rows = read_csv(folder / "metrics.csv")
    results = json.loads((folder / "results.json").read_text())
    assert [row["epoch"] for row in rows] == [*"123"]
    assert results["means"]["A"] == pytest.approx(np.mean([float(row["A"]) for row in rows]))
    assert np.asarray(Image.open(folder / "curves.png")).std() > 1
    torch.manual_seed(0)
    untrained = mc.Model("small")
    trained = mc.load_model(folder)
    assert not trained.training
    _, sets = mc.load_data(TINY)
    for row, role, name in zip(results["probes"], ("seen", "unseen"), sets):
        assert (row["dataset"], row["role"]) == (name, role)
        for model, before in ((untrained, "random_"), (trained, "")):
            # as in the run: another memory format rounds otherwise, enough for a close decision
            expected = mc.probe(model.to(memory_format=torch.channels_last), *sets[name])
            assert (row[before + "linear"], row[before + "knn"]) == pytest.approx(expected)


def test_the_curves_show_the_history(finished):
    history = mc.load_checkpoint(finished["folder"])["history"]
    panels = mc.draw_curves(history, "title").axes
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    assert list(lines) == ["loss", "angle", "log_E", "log_D", "log_A"]
    for name, line in lines.items():
        assert line.get_xydata().tolist() == [[row["epoch"], row[name]] for row in history]


def test_runs_that_start_together_have_a_folder_each_with_a_name_for_every_system(tmp_path):
    config = replace(TINY, dataset="folder:C:\\my photos/*?" + 300 * "x", out=str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: mc.new_folder(config), range(40)))
    assert len(set(folders)) == 40
    for folder in folders:
        assert re.fullmatch("[A-Za-z0-9._+-]{1,120}", folder.name)


def test_a_full_disk_leaves_the_checkpoint_and_the_run_goes_on(tmp_path, monkeypatch, finished):
    def full(state, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("file write failed")  # as PyTorch has it

    def begin(row, model):  # after the first epoch
        monkeypatch.setattr(torch, "save", full)

    with pytest.raises(RuntimeError, match="file write failed"):
        mc.run(TINY, begin, folder=tmp_path, untrained=False, verbose=False)
    monkeypatch.undo()
    assert len(mc.load_checkpoint(tmp_path)["history"]) == 1
    mc.run(TINY, folder=tmp_path, verbose=False)
    assert outcome(tmp_path) == outcome(finished["folder"])


def test_a_checkpoint_from_elsewhere_is_refused_in_a_line_and_executes_nothing(tmp_path, capsys):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"config": Malicious()}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="^2$"):
        mc.main(["--resume", str(tmp_path)])
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "executed").exists()


def test_a_folder_belongs_to_one_run(finished, capsys, tmp_path):
    config = mc.load_checkpoint(finished["folder"])["config"]
    with pytest.raises(ValueError, match="other settings"):
        mc.run(replace(config, temperature=0.3), folder=finished["folder"])
    # where it lies, where its data lie and what computed it are no part of what it is
    moved = shutil.copytree(finished["folder"], tmp_path / "moved")
    elsewhere = replace(config, out="elsewhere", data_dir="there", device="cuda")
    results = mc.run(elsewhere, folder=moved)
    assert results == json.loads(json.dumps(finished)) | {"folder": str(moved)}
    assert "has finished" in capsys.readouterr().out


# ---- 9. Ablation ---------------------------------------------------------------------------------
def test_an_ablation_is_paired_and_goes_on_where_it_stopped(tmp_path):
    settings = {"NT-Xent": mc.OFF, "wild / :": {"lr": 1e38}, "E+D+A": mc.ON}
    still = replace(TINY, lr=0.0, epochs=1, max_images=80)  # losses tell weights, batches, views
    lines = []
    rows = mc.ablate(settings, [3, 4], still, tmp_path, say=lines.append)
    losses = np.array([row["loss"] for row in rows]).reshape(2, 3)  # seeds, settings
    assert losses[0, 0] == losses[0, 2] != losses[1, 0] == losses[1, 2]
    assert all(math.isnan(value) for value in list(rows[1].values())[2:])  # it diverged
    assert [row["loss"] for row in read_csv(tmp_path / "runs.csv")] == [*map(str, losses.flat)]
    next(tmp_path.glob("*/results.json")).unlink()
    again = mc.ablate(settings, [3, 4], still, tmp_path, say=lines.append)
    assert str(again) == str(rows)
    assert re.fullmatch("6 runs.*3 finished", lines[-7])


def test_settings_that_would_share_a_folder_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="m<0.3.*m>0.3"):
        mc.ablate({"m<0.3": mc.ON, "m>0.3": mc.OFF}, [0], TINY, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def table_rows():
    """Rows of three settings and five seeds, of which one run collapses and one diverges.

    Another is 11 points below the first setting's run, but within 10 of that setting's mean.
    """
    columns = ("seen_linear", "unseen_linear", "log_E", "log_D", "log_A")
    values = 50 + np.random.default_rng(0).normal(size=(5, 3, 5))  # seeds, settings, columns
    values[1, 2, 0] = 10
    values[2, ::2, 0] = 57, 46
    values[4, 1, 0] = math.nan
    rows = []
    for seed, (i, setting) in itertools.product(range(5), enumerate("xyz")):
        rows.append({"setting": setting, "seed": seed} | dict(zip(columns, values[seed, i])))
    return rows, values


def test_table_and_figure_show_differences_paired_by_seed(capsys):
    rows, values = table_rows()
    mc.print_table(rows)
    out, _ = capsys.readouterr()
    panels = mc.draw_ablation(rows).axes
    for i, setting in enumerate("xyz"):
        mean = values[:, i].mean(0)
        gain = values[:, i] - values[:, 0]
        error = gain.std(0, ddof=1) / math.sqrt(5)
        expected = [mean[0], gain[:, 0].mean(), error[0]]  # seen
        expected += [mean[1], gain[:, 1].mean(), error[1]]  # unseen
        expected += [min(i, 1), *mean[2:]]  # failed runs, log factors
        (line,) = re.findall(f"^{setting} .*", out, re.M)
        printed = [float(x) for x in re.findall(r"[+-]?\d+\.?\d*|nan", line)]
        assert printed == pytest.approx(expected, abs=0.051, nan_ok=True)
        for axes, gains in zip(panels, gain.T):
            dots, bar = axes.get_lines()[2 * i : 2 * i + 2]
            assert dots.get_xdata() == pytest.approx(gains, abs=1e-4, nan_ok=True)
            assert bar.get_xdata() == pytest.approx(gains.mean(), abs=1e-4, nan_ok=True)
            assert {*dots.get_ydata(), *bar.get_ydata()} == {setting}


def test_ablate_without_its_guard_ends_at_once_with_advice(tmp_path):
    call = "ablate({'E': OFF}, [0, 1], Config(epochs=1, device='cpu'), 'out')\n"
    (tmp_path / "script.py").write_text("from margin_contrastive import *\n" + call)
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parent)}
    command = [sys.executable, "script.py"]
    process = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    last = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 1
    assert '`if __name__ == "__main__":`' in last
    assert "import" in last


# ---- 10. Command line ----------------------------------------------------------------------------
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="it is there")


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--margin 4", "margin must be .* 3.14, not 4.0"),
        ("--encoder vgg", "vgg"),
        ("--unseen mnist", "mnist"),
        ("--max-images 20", "batch_size 64"),
        ("--max-images 4 --batch-size 2 --validation", "glyphs: 4 images"),
        ("--lr 1e38 --max-images 128", "lower --lr"),
        ("--device gpu", "gpu"),
        pytest.param("--device cuda", "CUDA|NVIDIA", marks=no_gpu),
        ("--out file", "file"),
        ("--dataset cifar10", "cifar10 could not .* into data: .*unreachable"),
        ("--dataset folder:absent", "absent"),
        ("--dataset folder:flat", "class folder in flat.train"),
        ("--dataset folder:empty", "no valid file for the classes b"),
        ("--dataset folder:broken", "0.png cannot be read"),
        ("--dataset folder:odd", r"odd: .* \['B', 'b'\]"),
        ("--marign 0.2", "--marign"),
        ("--resume absent", "absent.*checkpoint.pt"),
        ("--resume file", "file.*checkpoint.pt"),
        ("--resume absent --ablate", "not allowed"),
    ],
)
def test_invalid_input_is_told_with_exit_status_2(capsys, tmp_path, monkeypatch, flags, says):
    monkeypatch.setattr("urllib.request.urlopen", mock.Mock(side_effect=OSError("unreachable")))
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for name, classes in (("flat", [""]), ("empty", "ab"), ("broken", "ab"), ("odd", "ab")):
        write_folder(Path(name), classes, count=1)
    Path("empty/test/b/0.png").unlink()
    Path("broken/train/b/0.png").write_text("no picture")
    Path("odd/test/b").rename("odd/test/B")
    with pytest.raises(SystemExit, match="^2$"):
        mc.main(flags.split())
    out, error = capsys.readouterr()
    *usage, message = error.splitlines()
    assert re.search(says, message)
    assert "epoch" not in out
    assert all(line.startswith("usage: ") for line in usage)
    assert len(usage) < 2
    assert Path("runs").exists() == ("--lr 1e38" in flags)  # of which only the run shows it
    assert not list(Path().glob("**/checkpoint.pt"))


FLAGS = "--device cpu --max-images 80 --epochs 1 --batch-size 40".split()


def test_what_a_run_prints_is_what_it_wrote(capsys, tmp_path):
    mc.main([*FLAGS, "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    (folder,) = tmp_path.iterdir()
    assert lines[0] == f"{folder}: 80 images of 26 classes, small encoder, cpu"
    results = json.loads((folder / "results.json").read_text())
    for line, row in zip(lines[-2:], results["probes"]):
        assert line.startswith(f"{row['dataset']} ({row['role']}): linear probe ")
        printed = [float(x) for x in re.findall(r"([\d.]+)%", line)]
        columns = ("linear", "random_linear", "knn", "random_knn")
        assert printed == pytest.approx([row[name] for name in columns], abs=0.0501)


posix = pytest.mark.skipif(os.name == "nt", reason="sends signals as POSIX has them")


def start(folder, *flags):
    """The program as a user starts it, but able to take Ctrl-C where this process ignores it."""
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    if os.name != "nt":
        listen = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        how |= dict(start_new_session=True, preexec_fn=listen)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, PROGRAM, *flags], env=environment, **how)


@posix
def test_a_run_that_ctrl_c_stops_goes_on_bit_for_bit(tmp_path):
    flags = "--margin 0.2 --no-attenuation --device cpu --max-images 800 --epochs 3 --batch-size 40"
    whole = start(tmp_path, *flags.split(), "--out", "whole")
    process = start(tmp_path, *flags.split(), "--out", "stopped")
    lines = [process.stdout.readline(), process.stdout.readline()]  # as they come
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate()
    assert "margin0.2-E1D1A0" in lines[0]  # which loss it trains with
    assert "epoch 1 " in lines[1]
    assert process.returncode == 130
    assert re.fullmatch("\nstopped.*--resume.*\n", error)
    (run,) = tmp_path.glob("stopped/*")
    out, _ = start(tmp_path, "--resume", run, "--device", "cpu").communicate()
    assert out.count("epoch 3 ") == 1
    assert "epoch 1 " not in out
    assert whole.wait() == 0
    assert outcome(run) == outcome(tmp_path / "whole" / run.name)


@posix
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_ablation_and_its_workers_at_once(tmp_path, sent):
    process = start(tmp_path, "--ablate", "--epochs", "100", "--device", "cpu")
    process.stdout.readline()
    while not list(tmp_path.glob("runs/*/*/checkpoint.pt")):
        time.sleep(0.1)
    os.kill(process.pid, sent)  # as Jupyter on Windows does: to this process alone
    _, error = process.communicate(timeout=20)  # returns when no worker holds the pipe
    assert process.returncode == 130
    assert re.fullmatch("\nstopped.*same --ablate goes on.*\n", error)


def test_ablate_into_a_folder_that_the_console_cannot_show(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    process = start(tmp_path, *FLAGS, "--ablate", "--seeds", "2", "--seed", "5", "--out", "写真")
    out, error = process.communicate()
    assert process.returncode == 0 and error == "", error
    assert r"18 runs in \u5199\u771f" in out
    (folder,) = (tmp_path / "写真").iterdir()
    rows = read_csv(folder / "runs.csv")
    assert [row["seed"] for row in rows] == ["5"] * 9 + ["6"] * 9
    assert [row["setting"] for row in rows] == 2 * [*mc.SWITCHES, "pull x 0.5"]
    assert all(f"\n{row['setting']} " in out for row in rows)
    assert np.asarray(Image.open(folder / "figure.png")).std() > 1


# ---- Notebook and README -------------------------------------------------------------------------
README = PROGRAM.with_name("README.md").read_text(encoding="utf-8")
CELLS = json.loads(PROGRAM.with_name("tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]
TEXT = "".join("".join(output.get("text", [])) for output in OUTPUTS)


def test_the_stored_notebook_is_one_clean_run():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for output in OUTPUTS:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work)/|Warning", TEXT)


def test_the_readme_has_the_notebooks_table_and_its_links_lead_somewhere():
    rows = re.findall(r"^\|.*±.*", README, re.M)
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(rows) == 4
    assert all(row in TEXT for row in rows)
    assert ".png" in str(links)
    assert all((PROGRAM.parent / link).exists() for link in links)


@pytest.mark.parametrize("appendix", ["known-losses", "moco-clip"])
def test_an_appendix_needs_the_first_cell_alone(appendix, capsys):
    """Its checks assert themselves."""
    (cell,) = [cell for cell in CODE if cell["id"] == appendix]
    names = {}
    with mc.matplotlib.rc_context():
        exec("".join(CODE[0]["source"]), names)
        exec("".join(cell["source"]), names)
    (stored,) = cell["outputs"]
    claims = re.findall("(.*):  largest error", capsys.readouterr().out)
    assert claims == re.findall("(.*):  largest error", "".join(stored["text"]))
    assert claims


def margin_in_the_logit(positive, negatives, temperature=0.2, margin=0.2):
    """Cross-entropy with the margin in its positive's logit. (N,) and (N, K) cosines."""
    moved = (positive.acos() + margin).cos()[:, None]
    logits = torch.cat([moved, negatives], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


@pytest.mark.parametrize("method", ["lightly", "SimCLR", "MoCo", "CLIP"])
def test_the_lines_for_your_code_have_the_margin_losss_gradient(method):
    (block,) = [block for block in BLOCKS if "# lightly" in block]
    lines = block.splitlines(keepends=True)
    place = {"lightly": (1, 2), "SimCLR": (2, 3), "MoCo": (3, 5), "CLIP": (5, 7)}
    piece = lines[slice(*place[method])]
    assert method in "".join(piece)
    z1, z2 = pairs(8, 6, 0.3, 2.8)
    anchor = F.normalize(z1)
    key = F.normalize(z2)
    cosines = anchor @ key.T
    l_pos = cosines.diagonal()[:, None]
    l_neg = anchor @ F.normalize(torch.randn(20, 6, dtype=torch.float64)).T
    yours = dict(torch=torch, T=0.2, z1=z1, z2=z2, l_pos=l_pos, l_neg=l_neg, cosines=cosines)
    exec("".join(lines[:1] + piece), yours)
    if method == "MoCo":
        loss = margin_in_the_logit(l_pos.squeeze(1), l_neg)
    elif method == "CLIP":
        others = cosines[~torch.eye(8, dtype=torch.bool)].view(8, 7)
        loss = margin_in_the_logit(cosines.diagonal(), others)
    else:
        loss = textbook_margin_loss(z1, z2, temperature=0.2, margin=0.2)
    ours = yours["loss"] if "loss" in yours else yours["loss_fn"](z1, z2)  # lightly's is called
    result = torch.autograd.grad(ours, z1, retain_graph=True)
    expected = torch.autograd.grad(loss, z1)
    assert relative_error(result, expected) < 1e-8


@pytest.mark.parametrize("values", SWITCHES)
def test_the_loss_for_a_slide_has_the_same_gradients(values):
    (code,) = [block for block in BLOCKS if "def margin_nt_xent" in block]
    alone = dict(math=math, torch=torch, F=F)
    exec(code, alone)
    z = pairs(8, 6, 0.05, 3.0)
    for tau, m in ((0.2, 0.2), (0.1, 1.2)):
        settings = dict(zip(FACTORS, values), temperature=tau, margin=m)
        expected = gradients(mc.margin_contrastive_loss, z, **settings)
        copied = dict(zip("eda", values), tau=tau, m=m)
        assert relative_error(gradients(alone["margin_nt_xent"], z, **copied), expected) < 1e-8


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """The tutorial's recipe, which asserts it."""
    (cell,) = [cell for cell in CODE if "two-processes" in cell["metadata"].get("tags", [])]
    magic, *recipe = cell["source"]
    assert magic.startswith("%%writefile")
    assert len(recipe) <= 25
    (tmp_path / "recipe.py").write_text("".join(recipe))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parent)}
    process = subprocess.run(
        [sys.executable, *launch, "recipe.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    errors = re.findall(r"\d(?:\.\d+)?e-\d+", process.stdout)
    assert errors
    assert max(float(error) for error in errors) < 1e-12
