"""Each claim of margin_contrastive.py against something independent: autograd through the textbook
formula, a slow numpy loop, torchvision's operations, brute force. No network, no GPU."""
import csv
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
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
from margin_contrastive import Config, UserError

PROGRAM = Path(mc.__file__)
TINY = Config(device="cpu", max_images=240, epochs=3, batch_size=40, attenuation=0.0)  # seconds
SWITCHES = list(itertools.product((0.0, 1.0), repeat=3))  # of E, D, A

# ---- 1. Loss
def pairs(n, dim, low=0.001, high=3.14):
    """N pairs of embeddings of different lengths, at angles spread over [low, high]."""
    torch.manual_seed(0)
    plane = torch.linalg.qr(torch.randn(n, dim, 2, dtype=torch.float64)).Q
    angle = torch.linspace(low, high, n, dtype=torch.float64)[:, None]
    z1, other = plane.unbind(2)
    z = (0.5 + angle) * z1, 3 * (angle.cos() * z1 + angle.sin() * other)
    return [part.requires_grad_() for part in z]

def gradients(loss, z, **settings):
    return torch.autograd.grad(loss(*z, **settings), z)

def relative_error(result, reference):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(result, reference))

def slow_gradients(z1, z2, temperature, margin, subtractive_margin, emphasis, deemphasis,
                   attenuation, positive_scale):
    """The scaled gradient by definition, for every anchor and every other view, with numpy."""
    z = np.concatenate([z1, z2])
    count, length = len(z), np.linalg.norm(z, axis=1)
    y, gradient = z / length[:, None], np.zeros_like(z)
    for i in range(count):
        j = (i + count // 2) % count
        theta = 2 * math.atan2(np.linalg.norm(y[i] - y[j]), np.linalg.norm(y[i] + y[j]))
        moved = min(theta + margin, math.pi)
        negatives = [k for k in range(count) if k not in (i, j)]
        shares = {k: math.exp(y[i] @ y[k] / temperature) for k in negatives}
        wrong = sum(shares.values())
        plain, with_margin = (wrong / (wrong + math.exp(cosine / temperature)) for cosine in (
            math.cos(theta), math.cos(moved) - subtractive_margin))  # 1 - p
        g = math.sin(moved) / math.sin(theta) if moved < math.pi else 0.0
        E, D, A = max(g, 1.0), min(g, 1.0), with_margin / plain
        shares[j] = -wrong * positive_scale * E**emphasis * D**deemphasis
        for k, share in shares.items():
            weight = A**attenuation * plain * share / wrong / temperature / count
            for a, b in (i, k), (k, i):  # d cos(a, b) / d z_a
                gradient[a] += weight * (y[b] - (y[i] @ y[k]) * y[a]) / length[a]
    return gradient[:count // 2], gradient[count // 2:]

@pytest.mark.parametrize("values", [*SWITCHES, (0.5, 2.0, -1.0), (-1.0, 0.5, 2.0)])
def test_every_combination_of_strengths_is_the_definition(values):
    for margin, m2, tau, s in (0.3, 0.0, 0.2, 1.0), (1.2, 0.2, 0.1, 1.7), (0.0, 0.4, 0.5, 0.6):
        # past pi - m log D is -40 instead of -inf: exact for switches only
        z = pairs(6, 5, 0.1, 3.0 if values in SWITCHES else 1.9)
        settings = dict(zip(mc.OFF, values)) | dict(
            temperature=tau, margin=margin, subtractive_margin=m2, positive_scale=s)
        expected = slow_gradients(*(x.detach().numpy() for x in z), **settings)
        result = gradients(mc.margin_contrastive_loss, z, **settings)
        assert relative_error(result, map(torch.from_numpy, expected)) < 1e-10

@pytest.mark.parametrize("margin", [0.0, 0.2, 1.5, 3.0])
def test_all_on_is_the_textbook_margin_loss(margin):
    for tau, m2 in (0.05, 0.0), (0.2, 0.3), (1.0, 0.0):
        for z in pairs(16, 8), pairs(16, 8, 0.01, 0.5), pairs(16, 8, 2.5, 3.14):
            settings = dict(temperature=tau, margin=margin, subtractive_margin=m2)
            expected = gradients(mc.textbook_margin_loss, z, **settings)
            result = gradients(mc.margin_contrastive_loss, z, **settings)
            assert relative_error(result, expected) < 1e-10

def test_all_off_is_nt_xent_and_so_is_the_value_at_any_setting():
    z, loss = pairs(16, 8), functools.partial(mc.margin_contrastive_loss, temperature=0.1)
    nt_xent = functools.partial(mc.textbook_margin_loss, temperature=0.1, margin=0.0)
    assert relative_error(gradients(loss, z, **mc.OFF), gradients(nt_xent, z)) < 1e-12
    for values in (0, 0, 0), (1, 1, 1), (-1, 2, 0.5):
        value = loss(*z, **dict(zip(mc.OFF, values)))
        assert value.item() == pytest.approx(nt_xent(*z).item(), rel=1e-12)

@pytest.mark.parametrize("margin", [0.0, 0.05, 0.8, 2.0])
def test_factors_have_their_crossover_and_their_limits(margin):
    theta = torch.linspace(0.001, 3.14, 2000, dtype=torch.float64)
    (log_E, log_D, wrong_A), (_, _, right_A) = (mc.log_gradient_factors(
        theta.cos(), 0 * theta + u, temperature=0.1, margin=margin) for u in (60, -60))
    narrow = theta < (math.pi - margin) / 2
    assert (log_E > 0).equal(narrow & (margin > 0)) and (log_D < 0).equal(~narrow & (margin > 0))
    delta = (theta.cos() - (theta + margin).clamp(max=math.pi).cos()) / 0.1
    assert torch.allclose(right_A, delta, atol=1e-6) and wrong_A.abs().max() < 1e-9

def test_c_and_others_may_be_of_any_shape_and_from_anywhere():
    """MoCo's InfoNCE, with a queue of negatives, a margin in its logit and autograd."""
    q, k = pairs(12, 8, 0.1, 3.0)
    c, queue = F.cosine_similarity(q, k), F.normalize(torch.randn(30, 8, dtype=torch.float64))
    negatives = F.normalize(q) @ queue.T
    positive = (c.acos() + 0.4).clamp(max=math.pi).cos()
    logits = torch.cat([positive[:, None], negatives], 1) / 0.1
    terms = c.view(3, 4), (negatives / 0.1).logsumexp(1).view(3, 4)
    loss = mc.margin_loss(*terms, temperature=0.1, margin=0.4)
    result = torch.autograd.grad(loss, (q, k), retain_graph=True)
    expected = torch.autograd.grad(F.cross_entropy(logits, torch.zeros(12).long()), (q, k))
    assert relative_error(result, expected) < 1e-10

@pytest.mark.parametrize("values", SWITCHES)
def test_only_all_on_and_all_off_are_gradients_of_a_loss(values):
    """By finite differences of the gradient: a potential's Jacobian is symmetric."""
    def field(x):
        z = [part.clone().requires_grad_() for part in x.view(2, 3, 3)]
        settings = dict(temperature=0.3, margin=0.8) | dict(zip(mc.OFF, values))
        return torch.cat(gradients(mc.margin_contrastive_loss, z, **settings)).flatten()

    point = torch.cat(pairs(3, 3, 0.3, 2.6)).detach().flatten()
    steps = 1e-5 * torch.eye(len(point), dtype=point.dtype)
    jacobian = torch.stack([field(point + step) - field(point - step) for step in steps])
    asymmetry = float((jacobian - jacobian.T).norm() / jacobian.norm())
    assert (asymmetry < 1e-6) == (len(set(values)) == 1), asymmetry

@pytest.mark.parametrize("tau", [1e-3, 0.2, 1e3])
def test_degenerate_embeddings_have_finite_gradients_at_any_setting(tau):
    z1 = torch.randn(4, 8)
    some, one = torch.tensor([[1], [0], [1], [0]]) * z1, z1[:1].expand(4, -1)
    cases = (z1, z1), (z1, -z1), (one, one), (some, z1), (0 * z1, 0 * z1), (z1 / 1e20, 1e15 * z1)
    for case, margin, strength in itertools.product(cases, (0, 0.2, 3.1), (-5, 0, 1, 5)):
        z, settings = [x.clone().requires_grad_() for x in case], dict.fromkeys(mc.OFF, strength)
        settings |= dict(temperature=tau, margin=margin, subtractive_margin=2.0, positive_scale=1.0)
        result = gradients(mc.margin_contrastive_loss, z, **settings)
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

@pytest.mark.parametrize("name, value", [
    ("temperature", 0.0), ("temperature", math.nan), ("margin", -0.1), ("margin", math.pi),
    ("subtractive_margin", -0.1), ("emphasis", math.nan), ("deemphasis", -math.inf),
    ("attenuation", math.inf), ("positive_scale", 0.0)])
def test_invalid_settings_are_named_with_their_value(name, value):
    for function in functools.partial(mc.margin_contrastive_loss, *torch.ones(2, 4, 3)), Config:
        with pytest.raises(ValueError, match=name + ".*" + re.escape(repr(value))):
            function(**{name: value})

def test_invalid_shapes_are_named():
    with pytest.raises(ValueError, match=re.escape("(4, 3), (5, 3)")):
        mc.margin_contrastive_loss(torch.ones(4, 3), torch.ones(5, 3))

def test_the_loss_has_the_defaults_of_the_config():
    assert Config().arguments(mc.margin_loss) | dict(return_factors=False) == (
        mc.margin_loss.__kwdefaults__)

# ---- 2. Augmentation
IMAGES = torch.rand(24, 3, 32, 40, generator=torch.Generator().manual_seed(0))

def test_crop_and_flip_are_torchvisions():
    rng = np.random.default_rng(0)
    h, w, flip = rng.integers(5, 33, 24), rng.integers(5, 41, 24), rng.integers(0, 2, 24) > 0
    top, left = rng.integers(0, 33 - h), rng.integers(0, 41 - w)
    boxes = torch.from_numpy(np.stack([top, left, h, w])).float().view(4, 24, 1, 1)
    result = mc.crop_and_flip(IMAGES, *boxes, torch.from_numpy(flip).view(24, 1, 1))
    for i, box in enumerate(zip(top, left, h, w)):
        expected = TF.resized_crop(IMAGES[i], *map(int, box), [32, 40], antialias=True)
        assert (result[i] - (TF.hflip(expected) if flip[i] else expected)).abs().max() < 1e-4

def test_colours_change_as_torchvisions_in_the_order_of_the_arguments():
    images = 0.4 + 0.2 * IMAGES  # to stay in [0, 1] at each step: ours are clamped once
    factors = torch.empty(24, 4).uniform_(0.7, 1.3)
    factors[:, 3] = torch.tensor([-1 / 3, 0, 1 / 3]).repeat(8)  # where two ways to turn a hue agree
    to_grey = torch.arange(24) % 5 == 0
    result = mc.jitter_colors(images, *factors.T.reshape(4, 24, 1, 1), to_grey.view(24, 1, 1))
    for i, image in enumerate(images):
        for name, factor in zip(("brightness", "contrast", "saturation", "hue"), factors[i]):
            image = getattr(TF, f"adjust_{name}")(image, float(factor))
        expected = TF.rgb_to_grayscale(image, 3) if to_grey[i] else image
        assert (result[i] - expected).abs().max() < 1e-4

def test_augment_draws_for_each_image_as_it_says(monkeypatch):
    """Against numpy's draws; a side that is too long is cut, where torchvision draws again."""
    drawn, n, shares = [], 20000, np.arange(0.025, 1, 0.05)
    for function in "crop_and_flip", "jitter_colors":
        monkeypatch.setattr(mc, function, lambda images, *x: drawn.extend(x) or images)
    mc.augment(torch.zeros(1, 3, 60, 80).expand(n, -1, -1, -1), crop_min=0.3)
    result = torch.cat(drawn, 1).squeeze(2).T.double().numpy()
    uniform = np.random.default_rng(0).uniform
    area, aspect = 4800 * uniform(0.3, 1, n), np.exp(uniform(np.log(3 / 4), np.log(4 / 3), n))
    h, w = np.minimum(np.sqrt(area / aspect), 60), np.minimum(np.sqrt(area * aspect), 80)
    strength = 0.5 * (uniform(0, 1, n) < 0.8)  # for all four colour amounts
    expected = np.stack([
        uniform(0, 1, n) * (60 - h), uniform(0, 1, n) * (80 - w), h, w, uniform(0, 1, n) < 0.5,
        *(1 + 0.8 * strength * uniform(-1, 1, (3, n))), 0.2 * strength * uniform(-1, 1, n),
        uniform(0, 1, n) < 0.1])
    difference = np.quantile(result, shares, 1) - np.quantile(expected, shares, 1)
    assert (np.abs(difference).max(0) < 0.03 * np.ptp(expected, 1)).all()
    assert np.abs(np.corrcoef(result) - np.corrcoef(expected)).max() < 0.04  # no draw used twice
    assert abs((result[5:9] == [[1], [1], [1], [0]]).all(0).mean() - 0.2) < 0.02

def test_no_padding_is_asked_for_or_needed(monkeypatch):
    """PyTorch before 2.13 has no border padding on Apple's GPUs."""
    sample, grids = F.grid_sample, []

    def spy(images, grid, **how):
        grids.append(((grid + 1) * torch.tensor([40, 32]) - 1) / 2)  # in pixels
        assert how == dict(align_corners=False)  # and so the padding that is everywhere, zeros
        return sample(images, grid, **how)

    monkeypatch.setattr(F, "grid_sample", spy)
    mc.augment(IMAGES.repeat(20, 1, 1, 1), crop_min=0.05)
    assert grids[0].min() > -1e-4 and (grids[0] < torch.tensor([39.0001, 31.0001])).all()

def test_augment_never_reads_a_value_back_from_the_device():
    mc.augment(torch.empty(8, 3, 32, 32, device="meta"))  # to read from meta raises

# ---- 3. Data
def test_glyphs_are_deterministic_balanced_and_there_to_see():
    images, labels = mc.glyphs("ABCDE", 50, seed=5)
    assert images.dtype == torch.uint8 and labels.bincount().tolist() == [10] * 5
    assert torch.equal(images, mc.glyphs("ABCDE", 50, 5)[0])
    assert not torch.equal(images, mc.glyphs("ABCDE", 50, 6)[0])
    assert ((images.amax((2, 3)) - images.amin((2, 3))) > 76).all()  # ink in every channel

@pytest.mark.parametrize("validation", [False, True])
def test_test_images_are_no_training_images_and_for_validation_unread(monkeypatch, validation):
    draw, read = mc.glyphs, []
    monkeypatch.setattr(mc, "glyphs", lambda *x: read.append(x[1:]) or draw(*x))
    mc.load_images.cache_clear()
    images, sets = mc.load_data(Config(validation=validation))
    assert list(sets) == ["glyphs", "digits"] and torch.equal(images, sets["glyphs"][0][0])
    assert ((2000, 1) in read, (2000, 3) in read) == (not validation, not validation)
    for name, parts in sets.items():
        train, test, every = ({image.numpy().tobytes() for image in images}
                              for images, _ in (*parts, mc.load_images(name, "train")))
        assert not train & test and (train | test == every) == validation
        assert len(test) == (len(every) // 5 if validation else 2000)

def write_folder(root, count=4):
    for split, letter, i in itertools.product(("train", "test"), "ab", range(count)):
        (root / split / letter).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (48, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / split / letter / f"{i}.png")

def test_a_folder_is_read_as_rgb_and_resized(tmp_path):
    write_folder(tmp_path)
    expected = []
    for mode, path in zip(("L", "P", "RGBA", "RGB"), tmp_path.glob("train/a/*.png")):
        Image.open(path).convert(mode).save(path)
        picture = TF.pil_to_tensor(Image.open(path).convert("RGB"))
        expected.append(TF.resize(picture, [32, 32], antialias=True))
    images, labels = mc.load_images(f"folder:{tmp_path}", "train")
    distance = (images[labels == 0].float()[:, None] - torch.stack(expected)).abs().amax((2, 3, 4))
    assert (distance <= 1).sum(0).tolist() == (distance <= 1).sum(1).tolist() == [1] * 4
    _, labels = mc.load_images(f"folder:{tmp_path}", "train", max_images=4)
    assert len(labels) == 4 and len(labels.unique()) == 2  # at random, not the first

@pytest.mark.parametrize("name, key, values", [
    *((name, "train", (True, False)) for name in ("cifar10", "cifar100", "fashion-mnist")),
    *((name, "split", ("train", "test")) for name in ("stl10", "svhn"))])
def test_torchvision_sets_are_asked_for_both_splits(monkeypatch, capsys, name, key, values):
    pictures = [(Image.new("L", (28, 28), 10 * i), i) for i in range(20)]
    theirs = mock.create_autospec(getattr(datasets, mc.TORCHVISION[name]), return_value=pictures)
    monkeypatch.setattr(datasets, mc.TORCHVISION[name], theirs)
    images, sets = mc.load_data(Config(dataset=name, data_dir=name, batch_size=20))
    assert theirs.call_args_list == [
        mock.call(name, download=True, **{key: value}) for value in values]
    assert (images == 10 * sets[name][0][1][:, None, None, None]).all() and images.shape[1] == 3
    theirs.side_effect = ModuleNotFoundError("No module named 'scipy'")  # as of SVHN without it
    status, _, error = main(capsys, "--dataset", name)
    assert status == 2 and error.count("\n") == 1 and "scipy" in error

# ---- 4. Encoder
def test_resnet18_has_a_stem_for_small_photographs():
    model, x = mc.Model("resnet18"), torch.rand(2, 3, 32, 32)
    assert torch.nn.Sequential(*list(model.encoder.children())[:4])(x).shape == (2, 64, 32, 32)
    assert [output.shape[1] for output in model(x)] == [512, 128]

# ---- 5. Probes
def test_probing_leaves_the_encoder_as_it_was():
    model = mc.Model("small").train()
    train, test = mc.glyphs("AB", 40, 0), mc.glyphs("AB", 30, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accuracies = mc.probe(model, train, test)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    h, h_test = (model.eval()(images / 255)[0].detach() for images, _ in (train, test))
    data = h, train[1], h_test, test[1]
    assert accuracies == pytest.approx((mc.linear_probe(*data), mc.knn(*data)))
    assert torch.allclose(mc.extract_features(model.train(), test[0]), h_test, atol=1e-6)

def blobs(count, seed):
    """Features in three overlapping classes, the first one the commonest, and their labels."""
    y = (torch.arange(count) % 20 - 17).clamp(min=0)
    noise = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))
    return 5 + 1.5 * F.one_hot(y, 10) + noise, y

def test_the_linear_probe_is_at_the_optimum_and_its_biases_are_free():
    """Gradient descent on the same problem, with numpy, ends at the same predictions."""
    (h, y), (h_test, y_test) = blobs(300, 0), blobs(10000, 1)
    x, x_test = (((part - h.mean(0)) / h.std(0)).double().numpy() for part in (h, h_test))
    weights, bias = np.zeros((10, 3)), np.zeros(3)
    for _ in range(3000):
        p = np.exp(x @ weights + bias)
        residual = (p / p.sum(1, keepdims=True) - np.eye(3)[y]) / len(x)
        weights, bias = weights - (x.T @ residual + 0.01 * weights), bias - residual.sum(0)
    guesses = (x_test @ weights + bias).argmax(1)
    for labels in torch.zeros(10000), torch.ones(10000), y_test:
        expected = 100 * (guesses == labels.numpy()).mean()
        assert mc.linear_probe(h, y, h_test, labels) == pytest.approx(expected, abs=0.05)

@pytest.mark.parametrize("classify", [mc.linear_probe, mc.knn])
def test_no_probe_learns_from_the_test_images(classify):
    (h, y), (h_test, y_test) = blobs(60, 0), blobs(20, 1)
    h_test[0] *= 1e4  # would spoil any statistics that it entered
    right = [classify(h, y, h_test[i:i + 1], y_test[i:i + 1]) for i in range(20)]
    assert classify(h, y, h_test, y_test) == pytest.approx(np.mean(right))  # rows are alone
    shares = [classify(h, y, h_test, torch.full((20,), label)) for label in range(3)]
    assert sum(shares) == pytest.approx(100)  # a guess does not depend on the test's labels

def test_knn_is_brute_force_with_ties_to_the_nearest():
    rng = np.random.default_rng(0)
    h_train, h_test = rng.normal(size=(120, 5)), rng.normal(size=(200, 5))
    y_train, y_test = rng.integers(0, 6, 120), rng.integers(0, 6, 200)
    right = []
    for h, y in zip(h_test, y_test):
        cosine = h_train @ h / np.linalg.norm(h_train, axis=1)
        nearest = y_train[np.argsort(-cosine)[:10]]
        votes = np.bincount(nearest, minlength=6)
        winners = set(np.flatnonzero(votes == votes.max()))
        right.append(next(label for label in nearest if label in winners) == y)
    data = map(torch.from_numpy, (h_train, y_train, h_test, y_test))
    assert mc.knn(*data) == pytest.approx(100 * np.mean(right))

# ---- 6. Training
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny run from beginning to end, to which interrupted ones are compared."""
    return mc.run(replace(TINY, out=str(tmp_path_factory.mktemp("finished"))), verbose=False)

def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))

def outcome(folder):
    """What a run ends with, interrupted or not: weights, metrics but for the times, accuracies."""
    weights = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["model"]
    rows = read_csv(Path(folder, "metrics.csv"))
    for row in rows:
        del row["images_per_second"]
    probes = json.loads(Path(folder, "results.json").read_text())["probes"]
    return {name: x.tolist() for name, x in weights.items()}, rows, probes

def test_a_run_leaves_what_the_readme_promises(finished):
    folder = Path(finished["folder"])
    names = ["checkpoint.pt", "curves.png", "metrics.csv", "results.json"]
    assert sorted(file.name for file in folder.iterdir()) == names
    rows, results = read_csv(folder / names[2]), json.loads((folder / names[3]).read_text())
    assert results["config"]["batch_size"] == 40 and [row["epoch"] for row in rows] == [*"123"]
    assert results["means"]["A"] == pytest.approx(np.mean([float(row["A"]) for row in rows]))
    assert np.asarray(Image.open(folder / "curves.png")).std() > 1
    torch.manual_seed(0)
    untrained, trained = mc.Model("small"), mc.load_model(folder)
    assert not trained.training
    _, sets = mc.load_data(TINY)
    for row, role, name in zip(results["probes"], ("seen", "unseen"), sets):
        assert row["dataset"] == name and row["role"] == role
        for model, before in (trained, ""), (untrained, "random_"):
            expected = row[before + "linear"], row[before + "knn"]
            assert expected == pytest.approx(mc.probe(model, *sets[name]))

def test_what_is_measured_is_what_autograd_says():
    """pull = |dL / dtheta| * tau of NT-Xent on the sphere, weight = dL / d others = 1 - p."""
    theta = torch.linspace(0.1, 3, 40, dtype=torch.float64).requires_grad_()
    others, forces = torch.linspace(-3, 8, 40, dtype=torch.float64).requires_grad_(), []
    for positive in theta.cos(), (theta + 0.8).clamp(max=math.pi).cos():
        loss = F.softplus(others - positive / 0.2).sum()
        forces += torch.autograd.grad(loss, (theta, others))
    pull, weight, pull_EDA, weight_A = forces
    g, A = ((theta + 0.8).sin() / theta.sin()).clamp(min=1e-9), weight_A / weight
    E, D = g.clamp(min=1), g.clamp(max=1)
    loss, *rest = mc.margin_loss(theta.cos(), others, margin=0.8, return_factors=True)
    expected = dict(
        loss=loss, angle=theta.rad2deg(), E=E, D=D, A=A, log_E=E.log(), log_A=A.log(),
        log_D=D.log().clamp(min=-5), weight=weight, weight_A=weight_A, pull=0.2 * pull,
        pull_ED=0.2 * pull_EDA / A)
    for name, value in mc.measure(loss, others, *rest, 0.2).items():
        assert torch.allclose(value, expected.pop(name), atol=1e-8), name
    assert not expected

def test_an_epoch_is_every_image_once_at_the_configs_settings_and_rates(monkeypatch, tmp_path):
    batches, draws, rates, augment, step = [], set(), [], mc.augment, torch.optim.SGD.step

    def spy(images, *, crop_min=0, gray_prob=0, flip=0):
        batches.append(images)
        draws.add(torch.rand(1).item())
        assert (crop_min, gray_prob, flip) == (0.7, 0.15, True)
        return augment(images)

    monkeypatch.setattr(mc, "augment", spy)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda optimizer: (
        rates.append(optimizer.param_groups[0]["lr"]) or step(optimizer)))
    config = replace(TINY, epochs=5, lr=0.3, crop_min=0.7, gray_prob=0.15, flip=True)
    mc.run(config, folder=tmp_path, verbose=False)
    expected = {(image / 255).numpy().tobytes() for image in mc.load_data(TINY)[0]}
    for seen in torch.stack(batches).view(5, 6, 80, -1):
        assert torch.equal(seen[:, :40], seen[:, 40:])  # two views of each
        assert {image.numpy().tobytes() for image in seen.flatten(0, 1)} == expected
    assert len(draws) == 30 and not torch.equal(batches[0], batches[6])  # in another order
    time = (np.arange(30) + 0.5) / 30
    fall = (1 + np.cos(np.pi * (time - 0.1) / 0.9)) / 2
    assert rates == pytest.approx(0.3 * 40 / 256 * np.where(time < 0.1, time / 0.1, fall))

def test_presets_follow_the_data_and_the_encoder():
    assert Config(**mc.preset("glyphs")) == Config() and not mc.preset("svhn")["flip"]
    small, large = mc.preset("folder:x", "small"), mc.preset("cifar10", "resnet18")
    assert small == dict(dataset="folder:x", encoder="small", unseen=(), crop_min=0.2, flip=True,
                         gray_prob=0.1, batch_size=128, epochs=20)
    assert large == small | dict(dataset="cifar10", encoder="resnet18", temperature=0.5,
                                 batch_size=512, lr=0.06, epochs=100)

@pytest.mark.parametrize("trouble", [FloatingPointError, OSError])
def test_a_checkpoint_is_replaced_whole_and_finite_or_not_at_all(tmp_path, monkeypatch, trouble):
    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError

    def begin(row, model):  # after the first epoch
        monkeypatch.setattr(torch, "save", full if trouble is OSError else torch.save)
        model.projector[0].weight.data *= 1 if trouble is OSError else math.nan

    with pytest.raises(trouble):
        mc.run(TINY, begin, folder=tmp_path, verbose=False)
    assert len(mc.read_checkpoint(tmp_path)["history"]) == 1

def test_bad_checkpoints_are_refused_and_execute_nothing(tmp_path, finished):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    state = torch.load(finished["folder"] + "/checkpoint.pt", weights_only=True)
    for bad in dict(config=Malicious()), state | dict(model={}), state | dict(config=dict(new=1)):
        torch.save(bad, tmp_path / "checkpoint.pt")
        with pytest.raises(UserError, match="checkpoint"):
            mc.load_model(tmp_path)
    assert not (tmp_path / "executed").exists()

def test_a_folder_belongs_to_one_run(finished, capsys):
    folder, before = finished["folder"], outcome(finished["folder"])
    config = mc.read_checkpoint(folder)["config"]
    with pytest.raises(UserError, match="other settings"):
        mc.run(replace(config, temperature=0.3), folder=folder)
    assert mc.run(config, folder=folder)["probes"] == finished["probes"]
    assert "has finished" in capsys.readouterr().out
    assert mc.run(replace(config, epochs=1), verbose=False)["folder"] != folder
    assert outcome(folder) == before

# ---- 7. Ablation
def test_an_ablation_is_paired_and_goes_on_where_it_stopped(tmp_path):
    assert SWITCHES == [tuple(x.values())[:3] for x in sorted(mc.SWITCHES.values(), key=str)]
    settings = {"NT-Xent": mc.OFF, "wild": dict(lr=1e38), "E+D+A": mc.ON}
    still, lines = replace(TINY, lr=0.0, epochs=1), []  # the loss tells weights, batches and views
    rows = mc.ablate(settings, [3, 4], still, tmp_path, say=lines.append)
    losses = np.array([row["loss"] for row in rows]).reshape(2, 3)  # seeds, settings
    assert losses[0, 0] == losses[0, 2] != losses[1, 0] == losses[1, 2]
    assert all(math.isnan(value) for value in list(rows[1].values())[2:])  # it diverged
    assert [row["loss"] for row in read_csv(tmp_path / "runs.csv")] == [*map(str, losses.flat)]
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/results.json")}
    (removed := next(iter(times))).unlink()
    again = mc.ablate(settings, [3, 4], still, tmp_path, say=lines.append)
    assert str(again) == str(rows) and "6 runs" in lines[-7] and "3 finished" in lines[-7]
    assert [file for file in times if file.stat().st_mtime_ns != times[file]] == [removed]

def test_the_controls_match_the_margin_in_force():
    """Sums over anchors of w E D / w, w = sigmoid(u) sin(theta), and of v A / v, v = sigmoid(u)."""
    seeds = np.array([[1], [2], [4]])  # of fifty anchors each
    w, v, ED, A = seeds * np.random.default_rng(0).uniform(0.1, 2, (4, 3, 50))
    columns = dict(pull=w, pull_ED=w * ED, weight=v, weight_A=v * A)
    rows = [dict(setting="E+D+A") | {name: x[seed].mean() for name, x in columns.items()}
            for seed in range(3)]
    rows.append(dict(setting="E+D+A") | dict.fromkeys(columns, math.nan))  # one that diverged
    rows.append(dict(setting="NT-Xent", pull=9, pull_ED=99, weight=9, weight_A=99))
    pull, lr = mc.matched_controls(rows, Config(lr=0.3)).values()
    assert pull == mc.OFF | dict(positive_scale=pytest.approx((w * ED).sum() / w.sum(), rel=5e-3))
    assert lr == mc.OFF | dict(lr=pytest.approx(0.3 * (v * A).sum() / v.sum(), rel=5e-3))

def test_the_table_shows_means_and_differences_paired_by_seed(capsys):
    columns = "seen_linear", "unseen_linear", "log_E", "log_D", "log_A"
    values = 50 + np.random.default_rng(0).normal(size=(5, 3, 5))  # seeds, settings, columns
    values[1, 2, 0], values[4, 1, 0] = 10, math.nan  # one collapses, one diverges
    rows = [dict(zip(("setting", *columns), (name, *values[seed, setting])))
            for seed in range(5) for setting, name in enumerate("xyz")]
    mc.print_table(rows)
    out, _ = capsys.readouterr()
    for setting, name in enumerate("xyz"):
        x, gain = values[:, setting], values[:, setting] - values[:, 0]
        error = gain.std(0, ddof=1) / math.sqrt(5)
        expected = [x[:, 0].mean(), gain[:, 0].mean(), error[0], x[:, 1].mean(), gain[:, 1].mean(),
                    error[1], min(setting, 1), *x[:, 2:].mean(0)]
        line, = re.findall(f"^{name} .*", out, re.M)
        printed = [float(x) for x in re.findall(r"[+-]?\d+\.?\d*|nan", line)]
        assert printed == pytest.approx(expected, abs=0.051, nan_ok=True)

# ---- 8. Command line
def main(capsys, *flags):
    """(exit status, standard output, standard error) of the command line, in this process."""
    with pytest.raises(SystemExit) as stop:
        mc.main([str(flag) for flag in flags])
    return (stop.value.code, *capsys.readouterr())

def test_help_has_every_flag_in_its_group(capsys):
    status, out, _ = main(capsys, "--help")
    groups = dict(re.findall(r"^([a-z ]+):\n((?:  .*\n|\n)+)", out, re.M))
    assert all(f"  --{f.name.replace('_', '-')}" in out for f in fields(Config)) and status == 0
    flags = dict(data="--unseen", views="--flip", training="--epochs", loss="the baseline")
    assert all(flags[name] in groups[name] for name in flags) and "--ablate" in groups["runs"]

@pytest.mark.parametrize("flags, says", [
    ("--margin 4", r"margin \(in radians\) .* not 4.0"), ("--epochs 0", "epochs"),
    ("--batch-size 1", "batch_size"), ("--encoder vgg", "vgg"), ("--dataset mnist", "mnist"),
    ("--unseen moon", "moon"), ("--max-images 20", "batch_size 64"), ("--lr fast", "fast"),
    ("--dataset cifar10", "unreachable"),
    ("--dataset folder:absent", "absent must hold train"), ("--crop-min 2", "crop_min"),
    ("--dataset folder:empty", "empty must hold train"), ("--dataset folder:odd", "odd.* classes"),
    ("--marign 0.2", "--marign; is it --margin"), ("--ablate nothing", "nothing"),
    ("--seeds 3", "--seeds .*--ablate"), ("--ablate --seeds 0", "--seeds .*at least 1"),
    ("--resume absent", "absent"), ("--resume x --margin 0.3", "--resume goes alone")])
def test_invalid_input_exits_with_2_and_one_line(capsys, tmp_path, monkeypatch, flags, says):
    monkeypatch.setattr("urllib.request.urlopen", mock.Mock(side_effect=OSError("unreachable")))
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write_folder(Path("odd"), count=1)
    Path("odd/test/b").rename("odd/test/c")
    status, out, err = main(capsys, *flags.split())
    assert status == 2 and re.search(says, err) and err.count("\n") == 1 and "epoch" not in out

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

@pytest.mark.parametrize("python, how", [(TORCHRUN[:1], signal.SIGINT), (TORCHRUN, signal.SIGTERM)])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, python, how):
    def start(flags):
        return subprocess.Popen(
            [*python, PROGRAM, *flags.split()], cwd=tmp_path, text=True, start_new_session=True,
            env=os.environ | dict(PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1"),  # two run at once
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    flags = ("--margin 0.2 --no-attenuation --unseen digits --unseen glyphs --device cpu "
             "--max-images 800 --epochs 3 --batch-size 40 ")
    whole, process = start(flags + "--out whole"), start(flags + "--out stopped")
    assert "margin0.2-E1D1A0" in process.stdout.readline()  # which loss it trains with
    assert "epoch 1 " in process.stdout.readline()
    os.killpg(process.pid, how)
    out, err = process.communicate()
    folder, = (tmp_path / "stopped").iterdir()
    if how == signal.SIGINT:
        assert process.returncode == 130 and err == "" and f"--resume stopped/{folder.name}" in out
    out, _ = start(f"--resume stopped/{folder.name}").communicate()
    assert out.count("epoch 3 ") == 1 and out.count(": linear probe ") == 2  # one process prints
    whole.communicate()
    assert outcome(folder) == outcome(tmp_path / "whole" / folder.name)

def test_ablate_from_the_command_line(tmp_path):
    flags = "--ablate --seeds 2 --device cpu --max-images 80 --epochs 1 --batch-size 40"
    command = [sys.executable, PROGRAM, *flags.split()]
    process = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    folder, = (tmp_path / "runs").iterdir()
    settings = [row["setting"] for row in read_csv(folder / "runs.csv")]
    assert len(settings) == 20 and settings[:8] == list(mc.SWITCHES)
    assert re.match("pull x .* lr x ", " ".join(settings[8:]))
    assert all(f"\n{setting} " in process.stdout for setting in settings)
    assert np.asarray(Image.open(folder / "figure.png")).std() > 1

# ---- Several processes
def worker(path):
    """One epoch by two processes, then by one; writes the relative error of the weights' change."""
    class Network(torch.nn.Linear):  # without BatchNorm, whose statistics are each process's own
        def forward(self, x):
            return None, super().forward(x.flatten(1) - 0.5)

    images = torch.randint(256, (48, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    def augment(images, *, flip=0):
        return torch.cat([images.chunk(2)[0], images.chunk(2)[1].flip(3)])

    mc.augment, changes = augment, []
    torch.distributed.init_process_group("gloo")
    for mc.WORLD, mc.RANK in (2, mc.RANK), (1, 0):
        torch.manual_seed(0)
        network = Network(3072, 4)
        before, optimizer = network.weight.detach().clone(), torch.optim.SGD(network.parameters())
        mc.train_epoch(network, optimizer, images, 0, Config(epochs=1, batch_size=16, margin=0.3))
        changes.append([network.weight.detach() - before])
    Path(path, os.environ["RANK"]).write_text(str(relative_error(*changes)))
    torch.distributed.destroy_process_group()

def test_the_gradient_of_two_processes_is_that_of_one(tmp_path):
    subprocess.run([*TORCHRUN, __file__, tmp_path], check=True)
    assert max(float(file.read_text()) for file in tmp_path.iterdir()) < 1e-5

# ---- Notebook and README
README = PROGRAM.with_name("README.md").read_text()

CELLS = json.loads(PROGRAM.with_name("tutorial.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]
TEXT = "".join("".join(output.get("text", [])) for output in OUTPUTS)

def test_the_stored_notebook_is_one_clean_run():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for output in OUTPUTS:
        assert output["output_type"] != "error" and output.get("name") != "stderr"
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work)/|Warning", TEXT)

def test_the_readme_has_the_notebooks_tables_and_its_links_lead_somewhere():
    tables = re.findall(r"^setting .*?(?=^```)", README, re.M | re.S)
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert tables and all(table in TEXT for table in tables)
    assert ".png" in str(links) and all((PROGRAM.parent / link).exists() for link in links)

@pytest.mark.parametrize("values", SWITCHES)
def test_the_loss_for_a_slide_has_the_same_gradients(values):
    section = re.search(r"^## Copy the loss\n.*?(?=^## |\Z)", README, re.M | re.S).group()
    code, = [block for block in re.findall(r"```python\n(.*?)```", section, re.S)
             if "def margin_nt_xent" in block]
    exec(code, alone := dict(math=math, torch=torch, F=F))
    z = pairs(8, 6, 0.05, 3.0)
    for tau, m in (0.2, 0.2), (0.1, 1.2):
        expected = gradients(mc.margin_contrastive_loss, z, temperature=tau, margin=m,
                             **dict(zip(mc.OFF, values)))
        copied = dict(zip("eda", values), tau=tau, m=m)
        assert relative_error(gradients(alone["margin_nt_xent"], z, **copied), expected) < 1e-8

if __name__ == "__main__":  # by torchrun
    worker(sys.argv[1])
