"""Each claim of margin_contrastive.py against something independent: autograd through the textbook formula, a slow
numpy loop, torchvision's functional operations, a brute-force search. No network, no GPU; run by `python -m pytest`."""
import base64
import csv
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.datasets
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import margin_contrastive as mc
from margin_contrastive import Config, UserError

PROGRAM = Path(mc.__file__)
TINY = Config(device="cpu", max_images=240, epochs=3, batch_size=40)  # seconds


def pairs(n, dim, low=0.001, high=3.14, seed=0, dtype=torch.float64):
    """N pairs of embeddings of random lengths, at angles spread evenly over [low, high] radians, with gradients."""
    rng = torch.Generator().manual_seed(seed)
    z1, other = (torch.randn(n, dim, generator=rng, dtype=torch.float64) for _ in range(2))
    z1 = F.normalize(z1)
    other = F.normalize(other - (other * z1).sum(1, keepdim=True) * z1)
    angle = torch.linspace(low, high, n, dtype=torch.float64)[:, None]
    lengths = 0.5 + torch.rand(2, n, 1, generator=rng, dtype=torch.float64)
    return [(length * z).to(dtype).requires_grad_() for length, z in
            zip(lengths, (z1, angle.cos() * z1 + angle.sin() * other))]


def gradients(loss, z, **settings):
    return torch.autograd.grad(loss(*z, **settings), z)


def relative_error(result, reference):
    return max((float((a - b).norm() / b.norm()) for a, b in zip(result, reference)))


# ---------------------------------------------------------------------------------------------------------------- Loss
@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5, 1.5, 3.0])
@pytest.mark.parametrize("subtractive_margin", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_all_on_is_the_textbook_margin_loss(margin, subtractive_margin, temperature):
    settings = dict(temperature=temperature, margin=margin, subtractive_margin=subtractive_margin)
    for seed, (n, dim) in enumerate([(2, 3), (7, 5), (32, 64)]):
        for low, high in ((0.001, 3.14), (0.01, 0.5), (2.5, 3.14)):  # all angles; nearly right; hardly any pull
            z = pairs(n, dim, low, high, seed)
            error = relative_error(gradients(mc.margin_contrastive_loss, z, **settings),
                                   gradients(mc.textbook_margin_loss, z, **settings))
            assert error < 1e-10, (n, dim, low, high)


def test_all_on_is_the_textbook_margin_loss_in_float32():
    for margin, temperature in itertools.product((0.1, 0.5), (0.1, 0.5)):
        settings = dict(temperature=temperature, margin=margin)
        exact = gradients(mc.textbook_margin_loss, pairs(32, 64, 0.3, 2.5), **settings)
        z = pairs(32, 64, 0.3, 2.5, dtype=torch.float32)
        assert relative_error(gradients(mc.margin_contrastive_loss, z, **settings), exact) < 1e-4


def nt_xent(z1, z2, temperature):
    """Plain NT-Xent as everyone writes it."""
    z = F.normalize(torch.cat([z1, z2]))
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)))


def test_all_off_is_nt_xent_and_so_is_the_value_whatever_the_settings():
    z = pairs(16, 8)
    for temperature in (0.05, 0.5):
        reference, expected = nt_xent(*z, temperature), torch.autograd.grad(nt_xent(*z, temperature), z)
        result = gradients(mc.margin_contrastive_loss, z, temperature=temperature, **mc.OFF)
        assert relative_error(result, expected) < 1e-12
        values = [mc.margin_contrastive_loss(*z, temperature=temperature, margin=m, subtractive_margin=m2, emphasis=e,
                                             deemphasis=d, attenuation=a, positive_scale=s).item()
                  for m, m2, e, d, a, s in [(0, 0, 0, 0, 0, 1), (0.2, 0, 1, 1, 1, 1), (1.0, 0.3, -1, 2, 0.5, 3)]]
        assert values[0] == values[1] == values[2] == pytest.approx(reference.item(), rel=1e-12)


def slow_gradients(z1, z2, temperature, margin, subtractive_margin, emphasis, deemphasis, attenuation, positive_scale):
    """The scaled gradient by definition, for every anchor and every other view; E, D, A from angle and probability."""
    z = np.concatenate([z1, z2])
    count, length = len(z), np.linalg.norm(z, axis=1)
    y, gradient = z / length[:, None], np.zeros_like(z)
    for i in range(count):
        j = (i + count // 2) % count
        theta = 2 * math.atan2(np.linalg.norm(y[i] - y[j]), np.linalg.norm(y[i] + y[j]))
        moved = min(theta + margin, math.pi)
        negatives = [k for k in range(count) if k not in (i, j)]
        exponentials = {k: math.exp(y[i] @ y[k] / temperature) for k in negatives}
        wrong = sum(exponentials.values())  # 1 - p is wrong / (wrong + right)
        plain = wrong / (wrong + math.exp(math.cos(theta) / temperature))
        with_margin = wrong / (wrong + math.exp((math.cos(moved) - subtractive_margin) / temperature))
        ratio = max(math.sin(moved), 0) / math.sin(theta) if theta + margin < math.pi else 0.0
        E, D, A = max(ratio, 1.0), min(ratio, 1.0), with_margin / plain
        pull = positive_scale * E**emphasis * (D**deemphasis if deemphasis else 1.0)
        for k, share in [(k, value / wrong) for k, value in exponentials.items()] + [(j, -pull)]:
            weight = A**attenuation * plain * share / temperature / count
            for a, b in ((i, k), (k, i)):  # d cos(a, b) / d z_a
                gradient[a] += weight * (y[b] - (y[i] @ y[k]) * y[a]) / length[a]
    return gradient[:count // 2], gradient[count // 2:]


@pytest.mark.parametrize("strengths", [*itertools.product((0.0, 1.0), repeat=3), (0.5, 2.0, -1.0), (-1.0, 0.5, 2.0),
                                       (2.0, 0.5, 0.5), (True, False, True)])
def test_every_combination_of_strengths_is_the_definition(strengths):
    for margin, m2, temperature, scale in ((0.3, 0.0, 0.2, 1.0), (1.2, 0.2, 0.1, 1.7), (0.0, 0.4, 0.5, 0.6)):
        # past pi - m, where D = 0, only the switches 0 and 1 are exact: log D is -40 there, so that D**b is e^(-40 b)
        z = pairs(6, 5, 0.1, 3.0 if set(strengths) <= {0, 1} else 1.9)
        settings = dict(temperature=temperature, margin=margin, subtractive_margin=m2, positive_scale=scale,
                        **dict(zip(mc.OFF, strengths)))
        result = [g.numpy() for g in gradients(mc.margin_contrastive_loss, z, **settings)]
        for a, b in zip(result, slow_gradients(*(x.detach().numpy() for x in z), **settings)):
            assert np.linalg.norm(a - b) < 1e-10 * np.linalg.norm(b)


def test_factors_are_the_sine_ratio_and_cross_over_where_they_should():
    theta = torch.linspace(0.001, 3.14, 2000, dtype=torch.float64)
    for margin in (0.05, 0.2, 0.8, 2.0):
        log_E, log_D, _ = mc.log_gradient_factors(theta.cos(), theta * 0, temperature=0.2, margin=margin)
        pulled = theta < math.pi - margin - 1e-6
        ratio = torch.sin(theta + margin) / torch.sin(theta)
        assert torch.allclose((log_E + log_D).exp()[pulled], ratio[pulled], rtol=1e-7, atol=1e-9)
        assert (log_D[theta > math.pi - margin + 1e-6] == -40).all()
        crossover = (math.pi - margin) / 2
        assert (log_E[theta < crossover - 1e-3] > 0).all() and (log_D[theta < crossover - 1e-3] == 0).all()
        assert (log_D[theta > crossover + 1e-3] < 0).all() and (log_E[theta > crossover + 1e-3] == 0).all()


def test_attenuation_has_its_limits_and_bounds():
    u = torch.linspace(-60, 60, 400, dtype=torch.float64)
    for theta, margin, m2, tau in itertools.product((0.0, 0.4, 1.5, 3.0), (0.0, 0.2, 1.0), (0.0, 0.3), (0.1, 0.5)):
        c = torch.full_like(u, math.cos(theta))
        log_A = mc.log_gradient_factors(c, u, temperature=tau, margin=margin, subtractive_margin=m2)[2]
        delta = (math.cos(theta) - math.cos(min(theta + margin, math.pi)) + m2) / tau
        if theta + margin < math.pi:
            closed = (2 * math.sin(margin / 2) * math.sin(theta + margin / 2) + m2) / tau
            assert delta == pytest.approx(closed, abs=1e-12)
        assert (log_A >= -1e-12).all() and (log_A <= delta + 1e-6).all()
        assert log_A[0].item() == pytest.approx(delta, abs=1e-6) and log_A[-1].item() == pytest.approx(0, abs=1e-12)
        assert (log_A.diff() <= 1e-12).all()  # the righter the anchor, the larger its A: the opposite of a focal weight
    zero = mc.log_gradient_factors(u * 0 + 0.3, u, temperature=0.2, margin=0.0)
    assert all((factor == 0).all() for factor in zero)  # no margin: exactly nothing
    log_E, log_D, log_A = mc.log_gradient_factors(u * 0 + 0.3, u, temperature=0.2, margin=0.0, subtractive_margin=0.1)
    assert (log_E == 0).all() and (log_D == 0).all() and (log_A > 0).any()  # a subtractive margin is nothing but A


def jacobian_by_finite_differences(settings):
    z1, z2 = (z.detach() for z in pairs(3, 3, 0.3, 1.0))
    flat, step = torch.cat([z1, z2]).flatten(), 1e-5

    def field(x):
        z = [part.clone().requires_grad_() for part in x.view(2, 3, 3)]
        return torch.cat(gradients(mc.margin_contrastive_loss, z, temperature=0.3, margin=0.4, **settings)).flatten()

    return torch.stack([(field(flat + step * e) - field(flat - step * e)) / (2 * step)
                        for e in torch.eye(len(flat), dtype=flat.dtype)])


def test_only_all_on_and_all_off_are_gradients_of_a_loss():
    for strengths in itertools.product((0.0, 1.0), repeat=3):
        jacobian = jacobian_by_finite_differences(dict(zip(mc.OFF, strengths)))
        asymmetry = float((jacobian - jacobian.T).norm() / jacobian.norm())
        # these angles are below the crossover, where D does nothing
        assert (asymmetry < 1e-6) == (strengths[0] == strengths[2]), (strengths, asymmetry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_embeddings_have_finite_gradients_at_any_setting(dtype):
    same = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    zero = same * torch.tensor([[1.0], [0.0], [1.0], [0.0]], dtype=dtype)
    for first, second in ((same, same), (same, -same), (same[:1].repeat(4, 1), same[:1].repeat(4, 1)), (zero, same),
                          (zero, zero), (same * 0, same * 0), (same * 1e-20, same * 1e15)):
        for tau, margin, strength in itertools.product((1e-3, 0.2, 1e3), (0.0, 0.2, 3.1), (-5.0, -1.0, 0.0, 1.0, 5.0)):
            z = first.clone().requires_grad_(), second.clone().requires_grad_()
            loss = mc.margin_contrastive_loss(*z, temperature=tau, margin=margin, subtractive_margin=2.0,
                                              **dict.fromkeys(mc.LETTERS.values(), strength))
            loss.backward()
            assert loss.isfinite() and all(x.grad.isfinite().all() for x in z)
            assert all((x.grad[x.detach().norm(dim=1) == 0] == 0).all() for x in z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_under_autocast(dtype):
    z = [x.detach().to(dtype).requires_grad_() for x in pairs(16, 32, 0.3, 2.0)]
    exact = [x.detach().double().requires_grad_() for x in z]
    with torch.autocast("cpu", torch.bfloat16):
        loss = mc.margin_contrastive_loss(*z)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(mc.margin_contrastive_loss(*exact).item(), rel=1e-5)
    result = torch.autograd.grad(loss, z)
    assert all(g.dtype == dtype for g in result)
    reference = gradients(mc.margin_contrastive_loss, exact)
    assert relative_error([g.double() for g in result], reference) < torch.finfo(dtype).eps


def test_the_similarity_matrix_is_multiplied_in_full_precision(tmp_path):
    """Whichever way TF32 was switched on; in processes of their own, as torch cannot forget that it was."""
    script = tmp_path / "precision.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(PROGRAM.parent)!r})
import torch, margin_contrastive as mc
cuda, new = torch.backends.cuda.matmul, hasattr(torch.backends.cuda.matmul, "fp32_precision")

def precisions():
    return [cuda.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision] if new else [cuda.allow_tf32]

class Spy(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            seen.append((precisions(), args[0].dtype, torch.is_autocast_enabled("cpu")))
        return function(*args, **(kwargs or {{}}))

seen = []
exec(sys.argv[1])
before = precisions()
assert before != (["ieee", "ieee"] if new else [False])
with Spy(), torch.autocast("cpu", torch.bfloat16):
    mc.pair_terms(torch.randn(4, 3), torch.randn(4, 3), temperature=0.2)
assert seen == [(["ieee", "ieee"] if new else [False], torch.float32, False)], seen
assert precisions() == before
""")
    switches = ['torch.set_float32_matmul_precision("medium")', "torch.backends.cuda.matmul.allow_tf32 = True"]
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        switches += ['torch.backends.fp32_precision = "tf32"', 'torch.backends.cuda.matmul.fp32_precision = "tf32"']
    for switch in switches:
        process = subprocess.run([sys.executable, script, switch], capture_output=True, text=True)
        assert process.returncode == 0, (switch, process.stderr)


def test_scale_gradient_keeps_the_value_and_bounds_the_scale():
    x = torch.tensor([0.1, -3.7, 1e-30, 7.0], dtype=torch.float64, requires_grad=True)
    scaled = mc.scale_gradient(x, torch.tensor([-1.5, 39.0, -39.0, 45.0], dtype=torch.float64))
    assert torch.equal(scaled, x)
    gradient, = torch.autograd.grad(scaled.sum(), x)
    assert gradient.log().tolist() == pytest.approx([-1.5, 39.0, -39.0, 40.0])


@pytest.mark.parametrize("name, value", [
    ("temperature", 1e-39), ("emphasis", 1e39), ("deemphasis", -1e39),
    ("temperature", 0.0), ("temperature", -0.2), ("temperature", math.nan), ("temperature", math.inf), ("margin", -0.1),
    ("margin", math.pi), ("margin", math.nan), ("subtractive_margin", -0.1), ("subtractive_margin", math.inf),
    ("emphasis", math.nan), ("deemphasis", math.inf), ("attenuation", -math.inf), ("positive_scale", 0.0),
    ("positive_scale", -1.0)])
def test_invalid_settings_are_named_with_their_value(name, value):
    with pytest.raises(ValueError, match=re.escape(name) + ".*" + re.escape(repr(value))):
        mc.margin_contrastive_loss(torch.randn(4, 3), torch.randn(4, 3), **{name: value})


@pytest.mark.parametrize("first, second", [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((4,), (4,)), ((2, 4, 3), (2, 4, 3)),
                                           ((1, 3), (1, 3)), ((0, 3), (0, 3))])
def test_invalid_shapes_are_named(first, second):
    with pytest.raises(ValueError, match=re.escape(str(first)) + ".*" + re.escape(str(second))):
        mc.margin_contrastive_loss(torch.zeros(first), torch.zeros(second))


def test_the_loss_can_be_copied_into_a_file_with_torch_alone():
    source, readme = PROGRAM.read_text(), PROGRAM.with_name("README.md").read_text()
    section = source[source.index("def check_loss_arguments"):source.index("def crop_and_flip")]
    imports = re.search("They need.*?```python\n(.*?)```", readme, re.S).group(1)
    exec(imports + "\n" + section.replace("\n@contextlib", "\n\n@contextlib"), alone := {})
    z = pairs(5, 4)
    assert alone["margin_contrastive_loss"](*z).item() == mc.margin_contrastive_loss(*z).item()
    assert alone["textbook_margin_loss"](*z, temperature=0.2, margin=0.2).item() > 0


def test_the_loss_has_the_default_settings_of_the_config():
    defaults = {name: p.default for name, p in inspect.signature(mc.margin_contrastive_loss).parameters.items()}
    assert {name: defaults[name] for name in Config().resolve().loss_arguments()} == Config().resolve().loss_arguments()


# -------------------------------------------------------------------------------------------------------- Augmentation
@pytest.fixture
def images():
    return torch.rand(24, 3, 32, 40, generator=torch.Generator().manual_seed(0))


def test_crop_and_flip_are_torchvisions(images):
    rng = torch.Generator().manual_seed(1)
    h, w = torch.randint(5, 33, (24,), generator=rng), torch.randint(5, 41, (24,), generator=rng)
    top, left = (torch.rand(24, generator=rng) * (33 - h)).long(), (torch.rand(24, generator=rng) * (41 - w)).long()
    flips = torch.rand(24, generator=rng) < 0.5
    result = mc.crop_and_flip(images, torch.stack([top, left, h, w], 1).float(), flips)
    for i, image in enumerate(images):
        expected = TF.resized_crop(image, int(top[i]), int(left[i]), int(h[i]), int(w[i]), [32, 40], antialias=True)
        assert (result[i] - (TF.hflip(expected) if flips[i] else expected)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue", "gray"])
def test_each_colour_operation_is_torchvisions(images, name):
    one, zero = torch.ones(24), torch.zeros(24)
    amounts = dict(brightness=one, contrast=one, saturation=one, hue=zero, gray=zero.bool())
    assert (mc.jitter_colors(images, **amounts) - images).abs().max() < 1e-5  # nothing to do
    values = {"hue": torch.tensor([-1 / 3, 0, 1 / 3]).repeat(8), "gray": torch.arange(24) % 2 == 0}
    values = values.get(name, torch.linspace(0.2, 1.8, 24))
    result = mc.jitter_colors(images, **amounts | {name: values})
    for i, image in enumerate(images):
        if name == "gray":
            expected = TF.rgb_to_grayscale(image, 3) if values[i] else image
        else:
            expected = getattr(TF, f"adjust_{name}")(image, float(values[i]))
        assert (result[i] - expected.clamp(0, 1)).abs().max() < 1e-4


def test_the_colour_operations_come_in_the_order_of_their_names(images):
    """Colours that stay in [0, 1] at each step, as ours are clamped once, and hue by a third of a turn, as above."""
    images = 0.35 + 0.3 * images
    factors = dict(brightness=0.9, contrast=1.1, saturation=0.8, hue=1 / 3)
    amounts = [torch.full((24,), factor) for factor in factors.values()]
    result = mc.jitter_colors(images, *amounts, gray=torch.arange(24) < 12)
    for i, image in enumerate(images):
        for name, factor in factors.items():
            image = getattr(TF, f"adjust_{name}")(image, factor)
        assert (result[i] - (TF.rgb_to_grayscale(image, 3) if i < 12 else image)).abs().max() < 1e-4


def test_augment_keeps_shape_and_range_and_gives_every_image_its_own_draw(images):
    torch.manual_seed(0)
    views = mc.augment(images, color_strength=1.0, gray_prob=0.3)
    assert views.shape == images.shape and views.dtype == images.dtype and 0 <= views.min() and views.max() <= 1
    copies = mc.augment(images[:1].repeat(24, 1, 1, 1))
    assert len({view.numpy().tobytes() for view in copies}) == 24
    torch.manual_seed(0)
    changed = images.clone()
    changed[3] = 0.5
    same = (mc.augment(changed, color_strength=1.0, gray_prob=0.3) == views).flatten(1).all(1)
    assert not same[3] and same[torch.arange(24) != 3].all()  # no image looks at another
    torch.manual_seed(0)
    grays = (mc.augment(images.repeat(40, 1, 1, 1), gray_prob=0.3).std(1) < 1e-6).all((1, 2)).float().mean()
    assert abs(grays - 0.3) < 0.05
    untouched = mc.augment(images, crop_scale=(1.0, 1.0), color_strength=0.0, gray_prob=0.0, flip=False)
    assert (untouched - images).abs().max() < 1e-5


def test_augment_draws_boxes_flips_and_jitter_as_torchvision_does(monkeypatch):
    drawn = {}
    monkeypatch.setattr(mc, "crop_and_flip", lambda images, *boxes_flips: drawn.update(crop=boxes_flips) or images)
    monkeypatch.setattr(mc, "jitter_colors", lambda images, *amounts: drawn.update(amounts=amounts) or images)
    torch.manual_seed(0)
    count, size = 20000, 512  # large images, as torchvision rounds its boxes to whole pixels
    image = torch.zeros(1, 3, size, size)
    mc.augment(image.expand(count, -1, -1, -1), crop_scale=(0.2, 1.0), color_strength=0.5)
    boxes, flips = drawn["crop"]
    top, left, h, w = boxes.unbind(1)
    assert min(top.min(), left.min()) >= 0 and (top + h).max() <= size * 1.001 and (left + w).max() <= size * 1.001
    theirs = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    theirs = torch.tensor(theirs).float()
    for ours, reference in ((h * w / size**2, theirs[:, 2] * theirs[:, 3] / size**2), (top / size, theirs[:, 0] / size),
                            (left / size, theirs[:, 1] / size), ((w / h).log(), (theirs[:, 3] / theirs[:, 2]).log())):
        assert abs(ours.mean() - reference.mean()) < 0.01 and abs(ours.std() - reference.std()) < 0.01
    brightness, contrast, saturation, hue, gray = drawn["amounts"]
    places = top / (size - h).clamp_min(1), left / (size - w).clamp_min(1)  # where in their range, 0 to 1
    every = torch.stack([*places, h * w, w / h, flips, brightness, contrast, saturation, hue, gray])
    jittered = every[:, brightness != 1]  # jitter comes for all four or none
    assert (torch.corrcoef(jittered) - torch.eye(len(every))).abs().max() < 0.04  # no two share a draw
    for amount, reach in ((brightness - 1, 0.4), (contrast - 1, 0.4), (saturation - 1, 0.4), (hue, 0.1)):
        assert 0.99 * reach < amount.abs().max() <= reach + 1e-6 and abs(amount.mean()) < 0.01
        assert abs((amount == 0).float().mean() - 0.2) < 0.02  # jitter comes with probability 0.8
    assert abs(flips.float().mean() - 0.5) < 0.02 and abs(gray.float().mean() - 0.1) < 0.02


def test_augment_never_reads_a_value_back_from_the_device():
    assert mc.augment(torch.empty(8, 3, 32, 32, device="meta")).shape == (8, 3, 32, 32)  # reading from meta raises


# ---------------------------------------------------------------------------------------------------------------- Data
def test_glyphs_are_deterministic_balanced_and_differ_between_splits():
    letters, labels = mc.glyphs("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 260, seed=5)
    again, _ = mc.glyphs.__wrapped__("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 260, seed=5)
    assert letters.shape == (260, 3, 32, 32) and letters.dtype == torch.uint8 and torch.equal(letters, again)
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [10] * 26
    assert not torch.equal(letters, mc.glyphs("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 260, seed=6)[0])
    contrast = (letters.float().amax((2, 3)) - letters.float().amin((2, 3))).min() / 255
    assert contrast > 0.3  # every picture holds its glyph, in every channel
    pretrain, sets, digest = mc.load_data(Config().resolve())
    assert [(name, role, len(train[1]), len(test[1])) for name, role, train, test in sets] == [
        ("glyphs", "seen", 5000, 2000), ("digits", "unseen", 2000, 2000)]
    assert len(pretrain) == 5000 and digest == mc.load_data(Config().resolve())[2]


def test_validation_holds_training_images_out_and_reads_no_test_image(monkeypatch):
    load, splits = mc.load_dataset, []
    monkeypatch.setattr(mc, "load_dataset", lambda *arguments: splits.append(arguments[1]) or load(*arguments))
    pretrain, sets, _ = mc.load_data(Config(validation=True).resolve())
    assert set(splits) == {"train"} and torch.equal(pretrain, sets[0][2][0]) and len(pretrain) == 4000
    for name, _, train, test in sets:
        every = {image.numpy().tobytes() for image in load(name, "train", Config().resolve())[0]}
        kept, held_out = ({image.numpy().tobytes() for image in part[0]} for part in (train, test))
        assert kept | held_out == every and not kept & held_out and len(test[1].unique()) == len(train[1].unique())


def write_folder(root, classes=("a", "b"), count=30, size=(32, 32), splits=("train", "test")):
    rng = np.random.default_rng(0)
    for split, (label, name) in itertools.product(splits, enumerate(classes)):
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 100, (size[1], size[0], 3)) + 150 * (np.arange(3) == label)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def test_pictures_of_every_kind_become_rgb(tmp_path):
    write_folder(tmp_path, count=1)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((32, 32))
    (tmp_path / "train" / "a" / "0.png").unlink()
    kinds = {"1.png": picture.convert("L"), "2.png": picture.convert("P"), "3.png": picture.convert("RGBA"),
             "4.jpg": picture, "5.png": picture}
    for name, image in kinds.items():
        image.save(tmp_path / "train" / "a" / name)
    images, labels = mc.read_folder(tmp_path, "train", 32)
    assert images.shape == (6, 3, 32, 32) and labels.tolist() == [0, 0, 0, 0, 0, 1]
    for image, (name, kind) in zip(images, kinds.items()):
        expected = TF.pil_to_tensor(Image.open(tmp_path / "train" / "a" / name).convert("RGB"))
        assert torch.equal(image, expected), name
    assert torch.equal(images[0, 0], images[0, 1]) and torch.equal(images[2], images[4])


def test_folder_of_images_is_read_resized_and_probed(tmp_path):
    write_folder(tmp_path / "seen", size=(48, 40))
    write_folder(tmp_path / "other", classes=("x", "y", "z"))
    unseen = f"folder:{tmp_path / 'other'}"
    config = Config(dataset="folder", data_dir=str(tmp_path / "seen"), probe_dataset=(unseen,), batch_size=20)
    pretrain, sets, _ = mc.load_data(config.resolve())
    assert pretrain.shape == (60, 3, 32, 32) and pretrain.dtype == torch.uint8
    assert sets[0][1] == "seen" and sets[0][2][1].bincount().tolist() == [30, 30]
    assert sets[1][1] == "unseen" and sets[1][3][1].bincount().tolist() == [30, 30, 30]
    image = TF.pil_to_tensor(Image.open(tmp_path / "seen" / "train" / "a" / "0.png"))
    expected = TF.resize(image, [32, 32], antialias=True)
    assert (pretrain[0].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("spoil, says", [
    (lambda root: None, "No such file"), (lambda root: (root / "train").mkdir(), "class folder"),
    (lambda root: write_folder(root, count=0), "no valid file"),
    (lambda root: [write_folder(root, splits=("train",)), write_folder(root, ("a", "c"), splits=("test",))], "b, c"),
    (lambda root: (write_folder(root) / "train" / "a" / "3.png").write_bytes(b"no picture"), "3.png"),
    (lambda root: (write_folder(root) / "train" / "a" / "3.png").write_bytes(
        (root / "train" / "a" / "4.png").read_bytes()[:200]), "3.png"),
    (lambda root: Image.new("1", (20000, 20000)).save(write_folder(root) / "train" / "a" / "3.png"), "3.png.*bomb")])
def test_a_spoilt_folder_is_one_clear_line(tmp_path, spoil, says):
    spoil(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        mc.load_data(Config(dataset="folder", data_dir=str(tmp_path)).resolve())
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def write_cifar(root, name):
    """Ten tiny batches in CIFAR's own format; returns {torchvision's list: what to put there}."""
    fine, folder = name == "CIFAR100", root / getattr(torchvision.datasets, name).base_folder
    folder.mkdir(parents=True)
    files, key = ({"train": "train", "test": "test", "meta": "meta"}, "fine_label_names") if fine else (
        {"train": "data_batch_1", "test": "test_batch", "meta": "batches.meta"}, "label_names")
    for split, file in files.items():
        pixels = np.random.default_rng(len(split)).integers(0, 256, (20, 3072), dtype=np.uint8)
        content = {key: [str(i) for i in range(10)]} if split == "meta" else {
            "data": pixels, "fine_labels" if fine else "labels": [i % 10 for i in range(20)]}
        (folder / file).write_bytes(pickle.dumps(content))
    md5 = {split: torchvision.datasets.utils.calculate_md5(str(folder / file)) for split, file in files.items()}
    return {"train_list": [[files["train"], md5["train"]]], "test_list": [[files["test"], md5["test"]]],
            "meta": {"filename": files["meta"], "key": key, "md5": md5["meta"]}}


def write_stl10(root, name):
    folder, lists, rng = root / "stl10_binary", {"train_list": [], "test_list": []}, np.random.default_rng(0)
    folder.mkdir()
    for which, file, count in (("train_list", "train_X.bin", 20), ("train_list", "train_y.bin", 0),
                               ("train_list", "unlabeled_X.bin", 30), ("test_list", "test_X.bin", 20),
                               ("test_list", "test_y.bin", 0)):
        labels = bytes(i % 10 + 1 for i in range(20))
        content = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tobytes() if count else labels
        (folder / file).write_bytes(content)
        lists[which].append([file, torchvision.datasets.utils.calculate_md5(str(folder / file))])
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    lists["class_names_file"] = "class_names.txt"
    return lists


def write_fashion_mnist(root, name):
    folder, rng = root / "FashionMNIST" / "raw", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        pixels = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 20, 28, 28) + pixels.tobytes())
        labels = bytes(i % 10 for i in range(20))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 20) + labels)
    return {}


def write_svhn(root, name):
    """A MATLAB 5 file with X (32, 32, 3, 20) uint8 and y (20, 1) uint8."""
    def element(kind, content):
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)

    def matrix(name, values):
        shape = np.array(values.shape, "<i4").tobytes()
        return element(14, element(6, struct.pack("<II", 9, 0)) + element(5, shape) + element(1, name.encode())
                       + element(2, values.tobytes(order="F")))

    rng, lists = np.random.default_rng(0), {}
    for split in ("train", "test"):
        pixels = rng.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
        labels = (np.arange(20, dtype=np.uint8) % 10 + 1)[:, None]
        header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49)
        file = root / f"{split}_32x32.mat"
        file.write_bytes(header + matrix("X", pixels) + matrix("y", labels))
        lists[split] = ["", file.name, torchvision.datasets.utils.calculate_md5(str(file))]
    return {"split_list": lists}


@pytest.mark.parametrize("dataset, class_name, write", [
    ("cifar10", "CIFAR10", write_cifar), ("cifar100", "CIFAR100", write_cifar), ("stl10", "STL10", write_stl10),
    ("fashion-mnist", "FashionMNIST", write_fashion_mnist), ("svhn", "SVHN", write_svhn)])
def test_torchvision_sets_are_read_from_their_own_files(tmp_path, monkeypatch, dataset, class_name, write):
    for attribute, value in write(tmp_path, class_name).items():  # these files' checksums instead of the real ones'
        monkeypatch.setattr(getattr(torchvision.datasets, class_name), attribute, value)
    config = Config(dataset=dataset, data_dir=str(tmp_path), probe_dataset=("digits",), batch_size=10).resolve()
    if dataset == "svhn" and not importlib.util.find_spec("scipy"):  # with which torchvision reads SVHN
        with pytest.raises(UserError, match="scipy"):
            mc.load_data(config)
        return
    pretrain, sets, _ = mc.load_data(config)
    (images, labels), (test_images, test_labels) = sets[0][2:]
    assert len(pretrain) == (30 if dataset == "stl10" else 20)
    assert images.shape == test_images.shape == (20, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.tolist() == test_labels.tolist() == [(i + (dataset == "svhn")) % 10 for i in range(20)]  # its 0 is 10
    assert not torch.equal(images, test_images)
    if dataset.startswith("cifar"):
        file, = tmp_path.glob("*/train" if dataset == "cifar100" else "*/data_batch_1")
        first = pickle.loads(file.read_bytes())["data"][0]
        assert torch.equal(images[0], torch.from_numpy(first.reshape(3, 32, 32)))
    if dataset == "fashion-mnist":
        assert torch.equal(images[:, 0], images[:, 1])


def test_a_set_that_cannot_be_downloaded_is_one_clear_line(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for dataset in ("cifar10", "cifar100", "stl10", "fashion-mnist"):
        with pytest.raises(UserError, match=f"{dataset}: .*--dataset glyphs") as error:
            mc.load_data(Config(dataset=dataset, data_dir=str(tmp_path)).resolve())
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- Evaluation
def test_resnet18_is_the_one_for_small_photographs():
    encoder = mc.Model("resnet18").encoder
    shapes = []
    encoder.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    encoder.layer4.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    encoder(torch.rand(2, 3, 32, 32))
    assert encoder.conv1.kernel_size == (3, 3) and shapes == [(2, 64, 32, 32), (2, 512, 4, 4)]


@pytest.mark.parametrize("encoder, features", [("small", 192), ("resnet18", 512)])
def test_probing_leaves_the_encoder_as_it_was(encoder, features):
    model = mc.Model(encoder).train()
    images, labels = mc.glyphs("AB", 40, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert mc.extract_features(model, images).shape == (40, features)
    mc.probe(model, [("AB", "seen", (images, labels), (images, labels))])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training
    mc.extract_features(model.eval(), images)
    assert not model.training
    h, z = model(images.float() / 255)
    assert h.shape == (40, features) and z.shape == (40, 128)


def test_linear_probe_separates_what_is_separable_and_finds_the_optimum():
    rng = torch.Generator().manual_seed(0)
    y_train, y_test = torch.arange(300) % 3, torch.arange(90) % 3
    centers = 3 * torch.randn(3, 10, generator=rng)
    h_train, h_test = (centers[y] + 100 + torch.randn(len(y), 10, generator=rng) for y in (y_train, y_test))
    assert mc.linear_probe(h_train, y_train, h_test, y_test) > 95
    assert mc.linear_probe(h_train, y_train, h_test, y_test) == mc.linear_probe(h_train, y_train, h_test, y_test)
    noise, other_noise = torch.randn(300, 10, generator=rng), torch.randn(3000, 10, generator=rng)
    assert 25 < mc.linear_probe(noise, y_train, other_noise, torch.arange(3000) % 3) < 42
    # gradient descent on the same problem, written with numpy, ends at the same predictions
    h_train, h_test = (centers[y] / 4 + torch.randn(len(y), 10, generator=rng) for y in (y_train, y_test))
    x, x_test = ((h - h_train.mean(0)) / h_train.std(0) for h in (h_train, h_test))
    x, x_test, target = x.double().numpy(), x_test.double().numpy(), np.eye(3)[y_train]
    weights, bias = np.zeros((10, 3)), np.zeros(3)
    for _ in range(3000):
        p = np.exp(x @ weights + bias)
        residual = (p / p.sum(1, keepdims=True) - target) / len(x)
        weights, bias = weights - (x.T @ residual + 1e-2 * weights), bias - residual.sum(0)
    expected = 100 * ((x_test @ weights + bias).argmax(1) == y_test.numpy()).mean()
    assert 40 < expected < 100 and mc.linear_probe(h_train, y_train, h_test, y_test) == pytest.approx(expected)


def test_linear_probe_leaves_its_biases_free():
    """With a penalty that wipes out the weights, only the biases are left, and they say the commonest class."""
    rng = torch.Generator().manual_seed(0)
    y = (torch.arange(300) % 10 > 6).long()  # 7 in 10 are class 0
    h = torch.randn(300, 5, generator=rng) + 10 * y[:, None]
    assert mc.linear_probe(h, y, h, y) == 100
    assert mc.linear_probe(h, y, h, y, l2=1e4) == pytest.approx(70)


def test_knn_is_brute_force_with_ties_to_the_nearest():
    rng = np.random.default_rng(0)
    h_train, h_test = rng.normal(size=(120, 5)), rng.normal(size=(200, 5))
    y_train, y_test = rng.integers(0, 6, 120), rng.integers(0, 6, 200)
    correct = ties = 0
    for h, y in zip(h_test, y_test):
        cosine = h_train @ h / np.linalg.norm(h_train, axis=1) / np.linalg.norm(h)
        nearest = y_train[np.argsort(-cosine)[:10]]
        votes = np.bincount(nearest, minlength=6)
        winners = set(np.flatnonzero(votes == votes.max()))
        ties += len(winners) > 1
        correct += next(label for label in nearest if label in winners) == y
    assert ties > 20
    tensors = (torch.from_numpy(x) for x in (h_train, y_train, h_test, y_test))
    assert mc.knn(*tensors) == pytest.approx(100 * correct / 200)


# ------------------------------------------------------------------------------------------------------------ Training
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny run from beginning to end, to which interrupted ones are compared."""
    return mc.run(replace(TINY, out=str(tmp_path_factory.mktemp("finished"))), verbose=False)


def read_results(folder):
    return json.loads((folder / "results.json").read_text()) | {"folder": folder}


def outcome(results):
    """What a run ends with, whether interrupted or not: weights, metrics but for the times, accuracies."""
    folder = Path(results["folder"])
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    rows = [{name: value for name, value in row.items() if name not in ("images_per_second", "seconds")}
            for row in csv.DictReader(open(folder / "metrics.csv"))]
    return {name: value.tolist() for name, value in weights.items()}, rows, results["probes"]


def test_a_run_leaves_what_the_readme_promises(finished):
    folder = Path(finished["folder"])
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "metrics.csv", "results.json", "checkpoint.pt", "curves.png"}
    results, config = (json.loads((folder / name).read_text()) for name in ("results.json", "config.json"))
    assert results["schema"] == 1 and results["config"] == config and config["temperature"] == 0.2
    assert {"versions", "device", "data_hash"} <= set(results)
    assert [probe["role"] for probe in results["probes"]] == ["seen", "unseen"]
    assert set(results["probes"][0]) == {"dataset", "role", "classes", "n_train", "n_test", "linear", "knn",
                                         "random_linear", "random_knn"}
    assert set(results["train"]) >= {"seconds", "images_per_second", "peak_memory_mb", "epochs", "mean_log_E",
                                     "mean_log_D", "mean_log_A"}
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert set(rows[0]) >= {"loss", "angle_degrees", "log_E", "log_D", "log_A", "past_crossover", "lr",
                            "images_per_second"}
    assert np.asarray(Image.open(folder / "curves.png")).std() > 1
    model = mc.load_model(folder)
    _, sets, _ = mc.load_data(TINY.resolve())
    assert not model.training and mc.probe(model, sets)[0][1] == results["probes"][0]["knn"]


def test_metrics_are_the_mean_factors_of_the_loss(monkeypatch, tmp_path):
    kept, loss = [], mc.margin_contrastive_loss

    def spy(*z, **settings):
        kept.append([x.detach().clone() for x in z])
        return loss(*z, **settings)

    seen = []
    monkeypatch.setattr(mc, "margin_contrastive_loss", spy)
    mc.run(replace(TINY, epochs=1, margin=1.5, out=str(tmp_path / "out")), lambda row, model: seen.append((row, model)),
           folder=tmp_path / "run", verbose=False)
    (row,), ((told, model),) = csv.DictReader(open(tmp_path / "run" / "metrics.csv")), seen
    assert {name: str(value) for name, value in told.items()} == row and isinstance(model, mc.Model)
    angles = torch.stack([torch.acos(F.cosine_similarity(*z)) for z in kept])
    E, D = (ratio := torch.sin(angles + 1.5) / torch.sin(angles)).clamp_min(1), ratio.clamp(0, 1)
    A = []
    for z in kept:
        z = F.normalize(torch.cat(z))
        count, exponentials = len(z), torch.exp(z @ z.T / 0.2)
        anchor, positive = torch.arange(count), torch.arange(count).roll(count // 2)
        right = exponentials[anchor, positive]
        wrong = exponentials.sum(1) - exponentials.diagonal() - right
        cosine = (z * z[positive]).sum(1)
        moved = torch.where(cosine.acos() < math.pi - 1.5, (cosine.acos() + 1.5).cos(), -1)
        A.append(wrong / (wrong + (moved / 0.2).exp()) / (wrong / (wrong + right)))
    A = torch.stack(A)
    assert (D == 0).any() and (A > 1.1).any()
    for name, factor in (("E", E), ("D", D), ("A", A)):
        assert float(row[name]) == pytest.approx(factor.mean().item(), rel=1e-3), name
        assert float(row[f"log_{name}"]) == pytest.approx(factor.log().clamp_min(-5).mean().item(), rel=1e-3), name
    assert float(row["angle_degrees"]) == pytest.approx(angles.rad2deg().mean().item(), rel=1e-4)
    assert float(row["past_crossover"]) == pytest.approx((angles > (math.pi - 1.5) / 2).float().mean().item())
    assert float(row["loss"]) == pytest.approx(sum(nt_xent(*z, 0.2).item() for z in kept) / len(kept), rel=1e-4)


@pytest.mark.parametrize("batch_size, warmup", [(40, 0.25), (120, 0.5), (40, 0.0)])
def test_the_learning_rate_rises_to_its_peak_and_falls_as_a_cosine(monkeypatch, tmp_path, batch_size, warmup):
    rates, step = [], torch.optim.SGD.step

    def spy(optimizer, *arguments):
        group, = optimizer.param_groups
        rates.append(group["lr"])
        assert group["momentum"] == 0.9 and group["weight_decay"] == 0.002
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    config = replace(TINY, epochs=4, batch_size=batch_size, warmup=warmup, lr=0.3, weight_decay=0.002)
    mc.run(replace(config, out=str(tmp_path)), verbose=False)
    peak, count = 0.3 * batch_size / 256, 4 * 240 // batch_size
    expected = []
    for time in ((i + 0.5) / count for i in range(count)):
        fall = (1 + math.cos(math.pi * (time - warmup) / (1 - warmup))) / 2
        expected.append(peak * (time / warmup if time < warmup else fall))
    assert rates == pytest.approx(expected)


def test_an_epoch_sees_every_image_once_with_the_views_that_the_config_asks_for(monkeypatch, tmp_path):
    batches, settings, augment = [], [], mc.augment

    def spy(images, **how):
        batches.append(images.clone())
        settings.append(how)
        return augment(images, **how)

    monkeypatch.setattr(mc, "augment", spy)
    config = replace(TINY, epochs=2, crop_min=0.7, color_strength=0.3, gray_prob=0.15, flip=True)
    mc.run(replace(config, out=str(tmp_path)), verbose=False)
    assert settings == 12 * [dict(crop_scale=(0.7, 1.0), color_strength=0.3, gray_prob=0.15, flip=True)]
    pretrain = mc.load_data(TINY.resolve())[0]
    for epoch in (batches[:6], batches[6:]):
        assert all(torch.equal(*batch.chunk(2)) for batch in epoch)  # each image twice, for its two views
        seen = torch.cat([batch[:40] for batch in epoch])
        assert sorted(image.numpy().tobytes() for image in seen) == sorted(
            (image.float() / 255).numpy().tobytes() for image in pretrain)
    assert not torch.equal(batches[0], batches[6])  # in another order


def test_seed_epoch_and_process_each_have_their_own_draws(monkeypatch):
    config, draws = replace(TINY, epochs=1, batch_size=240).resolve(), []
    images = mc.load_data(config)[0]
    monkeypatch.setattr(mc, "augment", lambda views, **_: draws.append(torch.rand(4)) or views)
    for seed, epoch, rank in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        monkeypatch.setattr(mc, "RANK", rank)
        model = mc.Model("small")
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        mc.train_epoch(model, optimizer, images, epoch, replace(config, seed=seed, amp=False))
    assert torch.equal(draws[0], draws[1]) and len({tuple(draw.tolist()) for draw in draws}) == 4


def test_photographs_preset_with_amp(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", count=20)
    config = Config(dataset="folder", data_dir=str(tmp_path / "data"), epochs=1, batch_size=20, amp=True, device="cpu")
    loss, dtypes = mc.margin_contrastive_loss, []
    monkeypatch.setattr(mc, "margin_contrastive_loss", lambda *z, **s: dtypes.append(z[0].dtype) or loss(*z, **s))
    results = mc.run(replace(config, out=str(tmp_path / "runs")), verbose=False)
    assert results["config"]["encoder"] == "resnet18" and results["config"]["amp"] is True
    assert set(dtypes) == {torch.bfloat16}  # the network's; the loss itself goes on in float32
    assert math.isfinite(results["train"]["mean_log_A"]) and results["probes"][0]["linear"] > 90  # red against green


def test_the_second_regime_has_all_three_factors_at_work(tmp_path):
    for regime in "standard", "all-active":
        config = replace(TINY, batch_size=None, regime=regime, out=str(tmp_path))
        means = mc.run(config, verbose=False)["train"]
        at_work = [means["mean_E"] > 1.3, means["mean_D"] < 0.85, means["mean_A"] > 1.3]
        assert at_work == [regime == "all-active"] * 3


def test_presets_fill_what_is_left_open_and_flags_win():
    glyphs, active = Config().resolve(), Config(regime="all-active", margin=0.9).resolve()
    assert (glyphs.flip, glyphs.probe_dataset, glyphs.encoder) == (False, ("digits",), "small")
    assert (active.batch_size, active.temperature, active.margin, active.lr) == (32, 0.1, 0.9, glyphs.lr)
    cifar = Config(dataset="cifar10").resolve()
    assert (cifar.flip, cifar.probe_dataset, cifar.encoder, cifar.temperature) == (True, ("cifar100",), "resnet18", 0.5)


def test_ctrl_c_drops_the_epoch_and_resuming_ends_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys, finished):
    augment, calls = mc.augment, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return augment(*args, **kwargs)

    monkeypatch.setattr(mc, "augment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mc.run(replace(TINY, out=str(tmp_path / "out")), folder=tmp_path / "run")
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert len(mc.read_checkpoint(tmp_path / "run")["history"]) == 1
    config = mc.read_checkpoint(tmp_path / "run")["config"]
    results = mc.run(config, folder=tmp_path / "run", verbose=False)
    assert outcome(results) == outcome(finished) and len(calls) == 9 + 2 * 6


def test_a_resumed_run_refuses_other_settings_and_other_images(finished, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="temperature is 0.2 in .* not 0.3"):
        mc.run(replace(mc.read_checkpoint(finished["folder"])["config"], temperature=0.3), folder=finished["folder"])
    write_folder(tmp_path / "data")
    config = replace(TINY, dataset="folder", data_dir=str(tmp_path / "data"), encoder="small", out=str(tmp_path))
    folder = mc.run(config, verbose=False)["folder"]
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "train" / "a" / "0.png")
    with pytest.raises(UserError, match="the hash of the images is"):
        mc.run(mc.read_checkpoint(folder)["config"], folder=folder, verbose=False)


def test_bad_checkpoints_are_refused_and_execute_nothing(tmp_path, finished):
    good, path = Path(finished["folder"], "checkpoint.pt").read_bytes(), tmp_path / "checkpoint.pt"

    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"schema": 1, "config": Malicious()}, malicious := io.BytesIO())
    state = torch.load(io.BytesIO(good), weights_only=True)
    torch.save(state | {"schema": 99}, later := io.BytesIO())
    torch.save(state | {"config": state["config"] | {"unheard_of": 1}}, other := io.BytesIO())
    contents = [(good[:-2000], "damaged"), (b"", "damaged"), (os.urandom(500), "damaged"),
                (malicious.getvalue(), "damaged"), (pickle.dumps(Malicious(), protocol=2), "damaged"),
                (later.getvalue(), "another version.*99"), (other.getvalue(), "another version.*unheard_of")]
    weights = {name.replace("projector.0", "head"): value for name, value in state["model"].items()}
    for broken, says in (*(({k: v for k, v in state.items() if k != key}, key) for key in state),
                         (state | {"model": weights}, "another version"), (torch.zeros(3), "damaged")):
        torch.save(broken, saved := io.BytesIO())
        contents.append((saved.getvalue(), says))
    for content, says in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match=says) as error:
            mc.read_checkpoint(tmp_path)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    path.unlink()
    with pytest.raises(UserError, match="there is no"):
        mc.load_model(tmp_path)


def test_a_loss_that_is_not_finite_stops_before_the_checkpoint_is_replaced(tmp_path, monkeypatch):
    loss, calls = mc.margin_contrastive_loss, []

    def poisoned(*z, **settings):
        calls.append(1)
        value, *rest = loss(*z, **settings)
        return (value * math.nan if len(calls) == 10 else value, *rest)

    monkeypatch.setattr(mc, "margin_contrastive_loss", poisoned)
    with pytest.raises(UserError, match="epoch 2, step 4: .*--lr"):
        mc.run(replace(TINY, out=str(tmp_path / "out")), folder=tmp_path / "run", verbose=False)
    checkpoint = mc.read_checkpoint(tmp_path / "run")
    assert len(checkpoint["history"]) == 1
    assert all(weight.isfinite().all() for weight in checkpoint["model"].parameters())


def test_a_second_run_gets_a_folder_of_its_own(tmp_path, finished):
    names = [mc.make_folder(replace(TINY, out=str(tmp_path)).resolve()).name for _ in range(3)]
    assert len(set(names)) == 3 and names[1] == names[0] + "-2"
    (tmp_path / "link").symlink_to(tmp_path / "not mounted")
    with pytest.raises(UserError, match="another --out"):
        mc.make_folder(replace(TINY, out=str(tmp_path / "link")).resolve())


def test_a_file_is_replaced_not_written_over(tmp_path):
    mc.write_file(tmp_path / "a.json", dict(old=1))
    os.link(tmp_path / "a.json", tmp_path / "before.json")  # the same file under another name
    mc.write_file(tmp_path / "a.json", dict(new=2))
    assert json.loads((tmp_path / "before.json").read_text()) == {"old": 1}
    assert json.loads((tmp_path / "a.json").read_text()) == {"new": 2} and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_and_a_folder_without_access_lose_nothing(tmp_path, monkeypatch, finished):
    write, folder = Path.write_bytes, tmp_path / "run"

    def full(self, content):
        if self.name == "checkpoint.pt.partial" and (folder / "metrics.csv").exists():  # after the first epoch
            write(self, content[:100])
            raise OSError(28, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left.*--resume"):
        mc.run(replace(TINY, out=str(tmp_path / "out")), folder=tmp_path / "run", verbose=False)
    monkeypatch.undo()
    assert not list(folder.glob("*.partial"))
    assert outcome(mc.run(mc.read_checkpoint(folder)["config"], folder=folder, verbose=False)) == outcome(finished)

    def denied(self, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", denied)
    with pytest.raises(UserError, match="Permission denied"):
        mc.run(mc.read_checkpoint(folder)["config"], folder=folder, verbose=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="another --out"):
        mc.run(replace(TINY, out=str(tmp_path / "file")), verbose=False)


def test_kill_at_random_moments_then_resume(tmp_path, finished):
    for attempt, wait in enumerate(np.random.uniform((0, 0.1), (0.1, 0.3))):
        out = tmp_path / f"runs{attempt}"
        process = subprocess.Popen([sys.executable, PROGRAM, *TINY_FLAGS, "--out", out], stdout=subprocess.DEVNULL)
        while not (begun := list(out.glob("*/checkpoint.pt"))) and process.poll() is None:
            time.sleep(0.01)
        folder = begun[0].parent
        time.sleep(wait)
        process.kill()
        assert process.wait() == -signal.SIGKILL  # it was still running
        for file in folder.glob("*.json"):
            json.loads(file.read_text())
        results = mc.run(mc.read_checkpoint(folder)["config"], folder=folder, verbose=False)
        assert outcome(results) == outcome(finished)


def test_learning_beats_the_untrained_encoder(tmp_path):
    results = mc.run(Config(epochs=4, margin=0.2, attenuation=0.0, device="cpu", out=str(tmp_path)), verbose=False)
    for row in results["probes"]:
        assert row["linear"] > row["random_linear"] + 20 and row["knn"] > row["random_knn"] + 10, row


# ------------------------------------------------------------------------------------------------------------ Ablation
def test_an_ablation_is_paired_and_goes_on_where_it_stopped(tmp_path):
    settings = mc.sweeps(TINY.resolve())["switches"]
    assert len(settings) == len({tuple(s.values()) for s in settings.values()}) == 8
    still = replace(TINY, lr=0.0, epochs=1)  # nothing learnt: the values tell weights, batches and views apart
    chosen = {name: settings[name] for name in ("NT-Xent", "E+D+A", "A")}
    rows = mc.ablate(chosen, [3, 4], still, tmp_path / "still", say=lambda *_: None)
    assert [(row["setting"], row["seed"]) for row in rows] == [(name, seed) for seed in (3, 4) for name in chosen]
    values = {}
    for file in (tmp_path / "still").glob("*/metrics.csv"):
        values.setdefault(file.parent.name.split("seed")[1][0], set()).add(next(csv.DictReader(open(file)))["loss"])
    assert len(values["3"]) == len(values["4"]) == 1 and values["3"] != values["4"]

    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "still").glob("*/results.json")}
    removed = next(iter(times))
    removed.unlink()
    lines = []
    assert mc.ablate(chosen, [3, 4], still, tmp_path / "still", say=lines.append) == rows
    assert "1 of 6 runs to do" in lines[0] and len(lines) == 2
    assert [file for file, when in times.items() if file.stat().st_mtime_ns != when] == [removed]
    assert len(list(csv.DictReader(open(tmp_path / "still" / "runs.csv")))) == 6
    assert len(list(csv.DictReader(open(tmp_path / "still" / "table.csv")))) == 3


def test_a_run_that_diverges_does_not_stop_its_sweep(tmp_path, capsys):
    settings = {"NT-Xent": mc.OFF, "wild": dict(lr=1e3, weight_decay=1e3), "A": mc.OFF | dict(attenuation=1.0)}
    rows = mc.ablate(settings, [0], replace(TINY, epochs=1), tmp_path, say=lambda *_: None)
    assert list(rows[0]) == list(rows[1]) and [math.isnan(row["seen_linear"]) for row in rows] == [False, True, False]
    assert all(math.isnan(value) for value in list(rows[1].values())[2:])
    mc.print_table(rows)
    assert re.search(r"^wild .* nan .*\nA +1 +[\d.]+ ", capsys.readouterr().out, re.M)


def test_a_setting_that_cannot_be_run_is_named_before_anything_is(tmp_path):
    with pytest.raises(UserError, match="of bold .*temperature must be"):
        mc.ablate({"NT-Xent": mc.OFF, "bold": dict(temperature=-1.0)}, [0], TINY, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_every_sweep_is_compared_with_plain_nt_xent_whatever_the_flags():
    config = replace(TINY, positive_scale=0.5, emphasis=-1.0).resolve()
    for sweep, settings in mc.sweeps(config).items():
        first = replace(config, **next(iter(settings.values())))
        assert first.positive_scale == 1 and not any(getattr(first, name) for name in mc.LETTERS.values()), sweep
        assert (config.emphasis, config.positive_scale) not in {
            (job.emphasis, job.positive_scale) for job in (replace(config, **s) for s in settings.values())}, sweep


def test_the_summary_is_the_mean_and_its_error_paired_by_seed():
    rng = np.random.default_rng(0)
    rows = [dict(setting=name, seed=seed, seen_linear=rng.normal(), log_E=rng.normal())
            for seed in range(5) for name in "xyz"]
    for name, summary in zip("xyz", mc.summarise(rows)):
        values, reference = ([row["seen_linear"] for row in rows if row["setting"] == which] for which in (name, "x"))
        difference = np.subtract(values, reference)
        assert summary["setting"] == name and summary["seeds"] == 5
        assert summary["seen_linear"] == pytest.approx(np.mean(values))
        assert summary["seen_linear_se"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
        assert summary["seen_linear_difference"] == pytest.approx(difference.mean(), abs=1e-12)
        assert summary["seen_linear_difference_se"] == pytest.approx(difference.std(ddof=1) / math.sqrt(5), abs=1e-12)
    assert math.isnan(mc.summarise(rows[:3])[0]["seen_linear_se"])


def test_the_controls_match_the_margin_and_know_no_angle():
    rows = [dict(setting="E+D+A", seed=seed, E=1.3 + seed / 10, D=0.9, A=1.1) for seed in (0, 1)]
    rows.append(dict(setting="E+D+A", seed=2, E=math.nan, D=math.nan, A=math.nan))  # one that diverged
    (pull, lr) = mc.matched_controls(rows, Config().resolve()).values()
    assert pull == mc.OFF | {"positive_scale": 1.25} and lr["lr"] == pytest.approx(1.1 * Config().resolve().lr)
    assert {name: lr[name] for name in mc.OFF} == mc.OFF
    assert mc.OFF == dict(emphasis=0, deemphasis=0, attenuation=0, positive_scale=1)
    assert mc.matched_controls(rows[2:], Config().resolve()) == {}
    extreme = mc.matched_controls([dict(setting="E+D+A", seed=0, E=1.0, D=0.0, A=1e5)], Config().resolve())
    assert [replace(Config(), **control).resolve() for control in extreme.values()]  # whatever happened, it can be run


def test_ablate_from_the_command_line(tmp_path):
    flags = "--ablate --seeds 2 --device cpu --max-images 80 --epochs 1 --batch-size 40"
    process = program(*flags.split(), cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert "8 settings x 2 seeds: 16 of 16 runs to do" in process.stdout
    assert "10 settings x 2 seeds: 4 of 20 runs to do" in process.stdout  # the controls
    folder = tmp_path / "runs" / "ablation-switches-glyphs-standard"
    runs, table = (list(csv.DictReader(open(folder / name))) for name in ("runs.csv", "table.csv"))
    assert len(runs) == 20 and [row["setting"] for row in table] == [row["setting"] for row in runs[:10]]
    printed = process.stdout[process.stdout.index("setting "):].splitlines()[1:11]
    assert [line.split("  ")[0] for line in printed] == [row["setting"] for row in table]
    assert np.asarray(Image.open(folder / "figure.png")).std() > 1


# --------------------------------------------------------------------------------------------------- Several processes
def test_the_gradient_of_two_processes_is_that_of_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(PROGRAM.parent)!r})
import weakref, torch, torch.distributed as dist, margin_contrastive as mc
dist.init_process_group("gloo")
group = weakref.ref(dist.group.WORLD)
torch.manual_seed(0)
x1, x2, layer = torch.randn(8, 5), torch.randn(8, 5), torch.nn.Linear(5, 4)
z1, z2 = layer(torch.cat([x1[mc.RANK::2], x2[mc.RANK::2]])).chunk(2)
mc.backward(mc.margin_contrastive_loss(mc.gather(z1), mc.gather(z2), margin=0.3, attenuation=0.5), layer)
two = layer.weight.grad.clone()
torch.optim.SGD(layer.parameters())
one, = torch.autograd.grad(mc.margin_contrastive_loss(layer(x1), layer(x2), margin=0.3, attenuation=0.5), layer.weight)
open({str(tmp_path)!r} + f"/error{{mc.RANK}}", "w").write(str(((one - two).norm() / one.norm()).item()))
dist.destroy_process_group()
assert group() is None  # kept, its threads abort some runs while Python shuts down
""")
    process = subprocess.run([*TORCHRUN, script], capture_output=True, text=True, env=QUIET)
    assert process.returncode == 0, process.stderr
    assert max(float((tmp_path / f"error{rank}").read_text()) for rank in (0, 1)) < 1e-6


def test_two_processes_train_checkpoint_and_resume(tmp_path):
    def torchrun(*flags):
        process = subprocess.run([*TORCHRUN, PROGRAM, *flags], capture_output=True, text=True, env=QUIET)
        assert process.returncode == 0, process.stderr
        return process.stdout

    assert torchrun(*TINY_FLAGS, "--out", tmp_path / "whole").count("epoch 3/3") == 1  # only the first process prints
    process = subprocess.Popen([*TORCHRUN, PROGRAM, *TINY_FLAGS, "--out", tmp_path / "killed"], env=QUIET, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    while "epoch 1/3" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (whole,), (killed,) = ((tmp_path / name).iterdir() for name in ("whole", "killed"))
    torchrun("--resume", killed)
    assert outcome(read_results(killed)) == outcome(read_results(whole))
    losses = [float(row["loss"]) for row in csv.DictReader(open(whole / "metrics.csv"))]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]


# -------------------------------------------------------------------------------------------------------- Command line
TINY_FLAGS = ["--device=cpu", "--max-images=240", "--epochs=3", "--batch-size=40"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def program(*flags, cwd):
    return subprocess.run([sys.executable, PROGRAM, *flags], cwd=cwd, capture_output=True, text=True)


def main(capsys, *flags):
    """(exit status, standard output, standard error) of the command line, in this process."""
    with pytest.raises(SystemExit) as stop:
        mc.main([str(flag) for flag in flags])
        raise SystemExit(0)
    return (stop.value.code, *capsys.readouterr())


def test_the_main_command_as_a_user_types_it(tmp_path):
    process = program("--margin", "0.2", "--no-attenuation", *TINY_FLAGS, cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == "" and "\r" not in process.stdout
    assert process.stdout.count("epoch ") == 3
    assert re.search(r"glyphs \(seen\) +\d+\.\d +\d+\.\d +\d+\.\d +\d+\.\d", process.stdout)
    folder, = (tmp_path / "runs").iterdir()
    config = json.loads((folder / "config.json").read_text())
    assert (config["margin"], config["emphasis"], config["deemphasis"], config["attenuation"]) == (0.2, 1.0, 1.0, 0.0)


def test_help_explains_every_knob(tmp_path):
    text = " ".join(program("--help", cwd=tmp_path).stdout.split())
    for knob in fields(Config):
        assert f"--{knob.name.replace('_', '-')}" in text and " ".join(knob.metadata["help"].split()[:4]) in text
    for flag in ("--no-emphasis", "--no-deemphasis", "--no-attenuation", "--resume", "--ablate", "--seeds"):
        assert flag in text


@pytest.mark.parametrize("flags, says", [
    ("--margin 4", "margin must be .* not 4.0"), ("--temperature 0", "temperature"), ("--emphasis nan", "emphasis"),
    ("--epochs 0", "epochs"), ("--batch-size 1", "batch_size"), ("--dataset mnist", "mnist"), ("--lr fast", "fast"),
    ("--seeds 0", "seeds"), ("--nonsense", "nonsense"), ("--device cuda:99", "cuda:99"), ("--max-images 20", "batch"),
    ("--probe-dataset moon", "moon"), ("--resume nowhere", "nowhere"), ("--ablate --resume x", "without --resume"),
    ("--dataset folder --data-dir nowhere", "nowhere"), ("--ablate nothing", "nothing")])
def test_invalid_values_exit_with_2_and_one_line(capsys, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    status, out, err = main(capsys, *flags.split())
    assert status == 2 and out == "" and re.search(says, err) and err.count("\n") == 1


def test_switches_without_effect_are_warned_of(capsys, tmp_path, monkeypatch, finished):
    monkeypatch.setattr(mc, "run", lambda config, folder=None: finished)
    assert "both margins are 0" in main(capsys, "--margin", 0)[2]
    assert "all 0" in main(capsys, "--no-emphasis", "--no-deemphasis", "--no-attenuation")[2]
    assert main(capsys, "--margin", 0, "--subtractive-margin", 0.2)[2] == main(capsys)[2] == ""


def test_resume_from_the_command_line(capsys, tmp_path, monkeypatch, finished):
    status, out, err = main(capsys, "--resume", finished["folder"], "--temperature", 0.3)
    assert status == 2 and re.search("temperature is 0.2 in .* not 0.3", err)
    status, out, err = main(capsys, "--resume", finished["folder"], "--temperature", 0.2)
    assert status == 0 and "results.json" in out


def test_ctrl_c_in_a_terminal(tmp_path, finished):
    process = subprocess.Popen([sys.executable, "-u", PROGRAM, *TINY_FLAGS], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "epoch 1/3" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    folder, = (tmp_path / "runs").iterdir()
    assert process.returncode == 130 and err == "" and f"--resume {Path('runs') / folder.name}" in out
    assert program("--resume", f"runs/{folder.name}", cwd=tmp_path).returncode == 0
    assert outcome(read_results(folder)) == outcome(finished)


def test_out_of_gpu_memory_says_which_flag_to_lower(capsys, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(mc, "run", exhausted)
    status, out, err = main(capsys)
    assert status == 2 and "--batch-size" in err and err.count("\n") == 1


# --------------------------------------------------------------------------------------------------- Notebook, README
@pytest.fixture(scope="module")
def notebook():
    file = PROGRAM.with_name("tutorial.ipynb")
    assert file.stat().st_size < 2 * 2**20
    return json.loads(file.read_text())


def stored_text(notebook):
    return "".join("".join(output.get("text", [])) for cell in notebook["cells"] for output in cell.get("outputs", []))


def test_the_stored_notebook_is_one_clean_run_of_this_code(notebook):
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        source, kinds = "".join(cell["source"]), [output["output_type"] for output in cell["outputs"]]
        assert "error" not in kinds and all(output.get("name") != "stderr" for output in cell["outputs"]), source
        shown = sum("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert shown == len(re.findall(r"^ *show\(", source, re.M)), source
        assert "stream" in kinds or not re.search(r"^(print|check|mc.print_table)\(", source, re.M), source
    text = stored_text(notebook)
    for function in (mc.margin_contrastive_loss, mc.log_gradient_factors, mc.scale_gradient, mc.textbook_margin_loss):
        assert inspect.getsource(function) in text
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|content)/|Warning|Traceback", text)


def test_the_readme_has_the_notebooks_tables_and_pictures(notebook):
    readme, text = PROGRAM.with_name("README.md").read_text(), stored_text(notebook)
    tables = re.findall(r"^setting +seeds.*?(?=^```)", readme, re.M | re.S)
    assert len(tables) == 2 and all(table.count("\n") == 11 and table in text for table in tables)  # ten settings each
    pictures = [output["data"]["image/png"] for cell in notebook["cells"] for output in cell.get("outputs", [])
                if "image/png" in output.get("data", {})]
    for link in re.findall(r"\]\((?!http)([^)]+)\)", readme):
        content = (PROGRAM.parent / link).read_bytes()
        assert not link.endswith(".png") or content in map(base64.b64decode, pictures), link


@pytest.mark.parametrize("regime, seeds", [("standard", 30), ("all-active", 20)])
def test_the_stored_tables_are_what_the_stored_runs_give(notebook, capsys, regime, seeds):
    with (PROGRAM.parent / ".results" / f"switches-{regime}.csv").open() as file:
        rows = [{name: value if name == "setting" else float(value) for name, value in row.items()}
                for row in csv.DictReader(file)]
    assert {row["seed"] for row in rows} == set(range(seeds)) and len(rows) == 10 * seeds
    mc.print_table(rows)
    assert capsys.readouterr().out in stored_text(notebook)
