#!/usr/bin/env python3
"""Margins in contrastive learning: what a margin does to the gradient, one effect at a time.

A contrastive loss pulls the two views of an image together (the positive pair) and pushes all others apart. A margin
makes the positive look worse than it is, by an angle m or a cosine m2. Rho et al. (arXiv:2306.11526, abstract of v1)
found that it scales the gradient in three ways. Here they are exact factors, each with a switch, or dial, of its own:

    E  emphasis     >= 1  pulls the positive harder, while the pair's angle is below (pi - m) / 2  --no-emphasis
    D  de-emphasis  <= 1  pulls it more softly beyond that angle, and not at all past pi - m       --no-deemphasis
    A  attenuation  >= 1  slows the fading of an anchor's gradient as it gets its pair right       --no-attenuation

All on: the gradient of the margin loss. All off: that of plain NT-Xent, SimCLR's loss. The split into exactly these
factors is this project's reading of the paper's three effects; tutorial.ipynb derives it line by line. The loss needs
nothing but torch: copy it.

    python margin_contrastive.py --margin 0.2 --no-attenuation   pretrain on letters, probe on letters and on digits
    python margin_contrastive.py --ablate                        the 2^3 switch settings and two controls, seeds paired
    torchrun --nproc_per_node=2 margin_contrastive.py            one run on two processes, on GPUs if there are any
"""
import argparse
import contextlib
import csv
import datetime
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing.pool
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # here, as a later import (by torch.optim) would keep the process group alive past its end
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import nn

SCHEMA = 1  # of checkpoint.pt and results.json
# torchrun sets them: which of all the processes this is, which of this machine's, and how many there are
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


class UserError(Exception):
    """Something the user can mend, in one line that says what, where and what to do; the command line exits with 2."""


class Diverged(UserError):
    """A loss or a weight that is not finite."""


@contextlib.contextmanager
def as_user_error(errors, what, advice):
    """Turn the expected errors of a block into a UserError: what went wrong (the error's own words); what to do."""
    try:
        yield
    except errors as error:
        reason = str(getattr(error, "strerror", None) or error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{what} ({reason}); {advice}") from error


# ------------------------------------------------------------------------------------------------------------- Config
PHOTOGRAPHS = dict(encoder="resnet18", epochs=100, batch_size=512, lr=0.06, margin=0.2, temperature=0.5, crop_min=0.2,
                   gray_prob=0.1, flip=True, probe_dataset=())
PRESETS = {  # they fill the knobs that are left at None
    "glyphs": dict(encoder="small", epochs=8, batch_size=64, lr=0.4, margin=0.2, temperature=0.2, crop_min=0.5,
                   gray_prob=0.2, flip=False, probe_dataset=("digits",)),
    "cifar10": PHOTOGRAPHS | dict(probe_dataset=("cifar100",)),
    "cifar100": PHOTOGRAPHS | dict(probe_dataset=("cifar10",)),
    "stl10": PHOTOGRAPHS, "svhn": PHOTOGRAPHS | dict(flip=False), "fashion-mnist": PHOTOGRAPHS, "folder": PHOTOGRAPHS}
REGIMES = {"standard": {}, "all-active": dict(batch_size=32, temperature=0.1, margin=1.2)}  # these win over the preset


def knob(default, text, *, choices=None, within=(-math.inf, math.inf)):
    """A field of Config: its default, its help text, the values or the closed interval it must lie in."""
    return field(default=default, metadata=dict(help=text, choices=choices, within=within))


@dataclass(frozen=True)
class Config:
    """Every knob of a run, with its help text; the command line is made from it. None: the preset (amp: the device)."""
    dataset: str = knob("glyphs", "images to pretrain on", choices=tuple(PRESETS))
    data_dir: str = knob("data", "where downloads go; for folder: DIR with DIR/train/CLASS/* and DIR/test/CLASS/*")
    probe_dataset: tuple = knob(None, "unseen set to probe on: digits, a torchvision set or folder:DIR; repeatable "
                                      "(default: digits for glyphs, each CIFAR set for the other)")
    validation: bool = knob(False, "probe on a fifth of the training images, held out; leave the test images alone")
    max_images: int = knob(0, "use at most this many images of each split, drawn at random (0: all)", within=(0, 1e12))
    image_size: int = knob(32, "images of another size are resized to this many pixels a side, once", within=(8, 1024))
    crop_min: float = knob(None, "smallest share of an image's area that a random crop keeps", within=(0.01, 1))
    color_strength: float = knob(0.5, "strength of the colour jitter (0: none)", within=(0, 1.25))
    gray_prob: float = knob(None, "probability of a grey view", within=(0, 1))
    flip: bool = knob(None, "mirror half of the views")
    encoder: str = knob(None, "network whose features are probed", choices=("small", "resnet18"))
    regime: str = knob("standard", "all-active: small batch, low temperature, large margin: E, D and A all act",
                       choices=tuple(REGIMES))
    margin: float = knob(None, "angular margin m on the positive pair, in radians, in [0, pi)")
    subtractive_margin: float = knob(0.0, "margin m2 taken off the positive's cosine")
    temperature: float = knob(None, "temperature tau of the softmax")
    emphasis: float = knob(1.0, "strength of E, its exponent: 1 as the margin has it, 0 off, 2 squared, -1 inverted")
    deemphasis: float = knob(1.0, "strength of D, likewise")
    attenuation: float = knob(1.0, "strength of A, likewise")
    positive_scale: float = knob(1.0, "scale the positive's pull by a constant: the control for E and D")
    epochs: int = knob(None, "passes over the training images", within=(1, 1e6))
    batch_size: int = knob(None, "images a step, over all processes together; each gives two views", within=(2, 1e6))
    lr: float = knob(None, "peak learning rate for a batch of 256; it scales with the batch size", within=(0, 1e3))
    weight_decay: float = knob(5e-4, "weight decay of SGD (momentum 0.9)", within=(0, 1e3))
    warmup: float = knob(0.1, "share of the run in which the learning rate rises; then it falls to 0", within=(0, 1))
    seed: int = knob(0, "seed of weights, batches and views; with --ablate the first of the --seeds", within=(0, 2**31))
    device: str = knob("auto", "auto (cuda, else mps, else cpu) or a device's name")
    amp: bool = knob(None, "bfloat16 autocast of the network (default: on CUDA)")
    compile: bool = knob(False, "torch.compile the network: a slow start, then faster steps on a GPU")
    out: str = knob("runs", "folder in which the run gets its own")

    def resolve(self):
        """A copy with the preset's values for None. ValueError, with the knob's name and value, if one is invalid."""
        preset = PRESETS.get(self.dataset, {}) | REGIMES.get(self.regime, {})
        config = replace(self, **{name: value for name, value in preset.items() if getattr(self, name) is None})
        config = replace(config, probe_dataset=tuple(config.probe_dataset or ()))
        for name, value, rule in ((f.name, getattr(config, f.name), f.metadata) for f in fields(self)):
            if rule["choices"] and value not in rule["choices"]:
                raise ValueError(f"{name} must be one of {', '.join(rule['choices'])}, not {value!r}")
            if isinstance(value, (int, float)) and not rule["within"][0] <= value <= rule["within"][1]:
                raise ValueError("{} must be in [{:g}, {:g}], not {!r}".format(name, *rule["within"], value))
        check_loss_arguments(**config.loss_arguments())
        if config.batch_size % WORLD:
            raise ValueError(f"batch_size must be a multiple of the {WORLD} processes, not {config.batch_size}")
        return config

    def loss_arguments(self):
        """The knobs that margin_contrastive_loss takes."""
        return {name: getattr(self, name) for name in ("temperature", "margin", "subtractive_margin", "emphasis",
                                                       "deemphasis", "attenuation", "positive_scale")}


# --------------------------------------------------------------------------------------------------------------- Loss
def check_loss_arguments(**arguments):
    """Raise ValueError, with the argument's name and value, for settings the mathematics below has no answer to."""
    strength = -1e6, 1e6
    limits = dict(temperature=(1e-6, math.inf), margin=(0, math.pi), subtractive_margin=(0, math.inf),
                  positive_scale=(1e-6, math.inf), emphasis=strength, deemphasis=strength, attenuation=strength)
    for name, value in arguments.items():
        low, high = limits[name]
        if not low <= value < high:
            raise ValueError(f"{name} must be in [{low:.6g}, {high:.6g}), not {value!r}")


@contextlib.contextmanager
def full_precision(device_type):
    """No autocast and no TF32 in its block's forward products: exp(cosine / temperature) magnifies rounding."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # since torch 2.9
        switches, name, exact = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), "fp32_precision", "ieee"
    else:
        switches, name, exact = (torch.backends.cuda.matmul,), "allow_tf32", False
    before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, exact)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before):
            setattr(switch, name, value)


def pair_terms(z1, z2, *, temperature):
    """The two numbers a contrastive loss needs of each anchor: its positive's cosine, its negatives' log-sum-exp.

    z1, z2: (N, D) embeddings of the two views, of any length (below 1e-12: zero, without a gradient). Returns
    (cos_positive, lse_negatives), (2N,) each, differentiable; float32, or float64 if the input is. With
    u = lse_negatives - cos_positive / temperature, NT-Xent is softplus(u) and the positive's probability sigmoid(-u).
    ValueError for shapes that differ or are not 2-D, fewer than 2 pairs, a temperature that is not positive."""
    if z1.shape != z2.shape or z1.ndim != 2 or len(z1) < 2:
        raise ValueError(f"z1 and z2 must both be (N, D) with N >= 2, not {tuple(z1.shape)} and {tuple(z2.shape)}")
    check_loss_arguments(temperature=temperature)
    with full_precision(z1.device.type):
        n, z = len(z1), torch.cat([z1, z2])
        z = z if z.dtype == torch.float64 else z.float()
        length = z.norm(dim=1, keepdim=True)
        z = z / length.masked_fill(length < 1e-12, torch.inf)
        cos_positive = (z[:n] * z[n:]).sum(1).repeat(2)
        same_image = torch.eye(n, dtype=torch.bool, device=z.device).repeat(2, 2)  # itself and its positive
        logits = ((z / temperature) @ z.T).masked_fill_(same_image, -torch.inf)
        return cos_positive, logits.logsumexp(1)


@torch.no_grad()
def log_gradient_factors(cos_positive, u, *, temperature, margin, subtractive_margin=0.0):
    """Logarithms of the factors by which a margin scales NT-Xent's gradient (exact; the effects: arXiv:2306.11526).

    cos_positive = cos(theta) and u as in pair_terms, any one shape; margin m in radians. Returns (log_E, log_D, log_A):
        g = sin(theta + m) / sin(theta)      E = max(g, 1)     D = min(g, 1)      E * D scales the positive's pull
        delta = (cos(theta) - cos(min(theta + m, pi)) + subtractive_margin) / temperature, which the margin adds to u
        A = sigmoid(u + delta) / sigmoid(u)                                       A scales all of the anchor's gradient
    E acts below theta = (pi - m) / 2, D above; past pi - m nothing pulls: D is 0, for which log_D = -40 stands.
    (A strength b of D gives e^(-40 b) there: nothing to rounding for b = 1, and far too much for any b < 0.)"""
    c = cos_positive
    sin = ((1 - c) * (1 + c)).clamp_min(torch.finfo(c.dtype).eps).sqrt()
    g = math.cos(margin) + math.sin(margin) * c / sin
    shifted = torch.where(g > 0, c * math.cos(margin) - sin * math.sin(margin), -1.0)  # g <= 0 where theta + m >= pi
    delta = (c - shifted + subtractive_margin) / temperature
    return g.clamp_min(1).log(), g.clamp(math.exp(-40), 1).log(), F.logsigmoid(u + delta) - F.logsigmoid(u)


def scale_gradient(x, log_scale):
    """x, to the last bit, with its gradient multiplied by exp(log_scale), a constant that is held in e^-40 to e^40."""
    return x.detach() + log_scale.detach().clamp(-40, 40).exp() * (x - x.detach())


def margin_contrastive_loss(z1, z2, *, temperature=0.2, margin=0.2, subtractive_margin=0.0, emphasis=1.0,
                            deemphasis=1.0, attenuation=1.0, positive_scale=1.0, return_factors=False):
    """NT-Xent whose gradient is scaled the way a margin scales it, with each of the three effects on its own dial.

    z1, z2: (N, D) embeddings of the two views, any floating dtype, normalised here. margin in radians (ArcFace's),
    subtractive_margin in cosine (CosFace's). The strengths are exponents, 1 as the margin has it, 0 off: the positive's
    pull is scaled by positive_scale * E**emphasis * D**deemphasis, all that the anchor does by A**attenuation.
    Returns a scalar whose *value* is plain NT-Xent's whatever the settings: the margin is in the gradient alone, so the
    value is not what is minimised. With return_factors: (loss, cos_positive, log_E, log_D, log_A), the last four (2N,)
    and detached, for logging. ValueError for invalid shapes and settings. Do not differentiate twice: the factors are
    constants to autograd, and with some of them off the gradient is in general not that of any loss."""
    margins = dict(temperature=temperature, margin=margin, subtractive_margin=subtractive_margin)
    check_loss_arguments(**margins, emphasis=emphasis, deemphasis=deemphasis, attenuation=attenuation,
                         positive_scale=positive_scale)
    cos_positive, lse_negatives = pair_terms(z1, z2, temperature=temperature)
    log_E, log_D, log_A = log_gradient_factors(cos_positive, lse_negatives - cos_positive / temperature, **margins)
    pull = scale_gradient(cos_positive, math.log(positive_scale) + emphasis * log_E + deemphasis * log_D)
    per_anchor = -F.logsigmoid(pull / temperature - lse_negatives)  # softplus(u); F.softplus itself cuts off at u = 20
    loss = scale_gradient(per_anchor, attenuation * log_A).mean()
    return (loss, cos_positive.detach(), log_E, log_D, log_A) if return_factors else loss


def textbook_margin_loss(z1, z2, *, temperature, margin, subtractive_margin=0.0):
    """The ordinary way: the margin inside the positive's logit, then cross-entropy, and autograd for the gradient.

    z1, z2: (N, D), N >= 2, float32 or float64; margin in radians. Returns a scalar. It shares nothing with the code
    above; a test finds the gradients of both equal."""
    n, z = len(z1), F.normalize(torch.cat([z1, z2]), dim=1)
    partner = z.roll(n, 0)
    # the angle from its chords: arccos of the cosine loses its digits, and its gradient's, near 0 and pi
    theta = 2 * torch.atan2((z - partner).norm(dim=1), (z + partner).norm(dim=1))
    positive = torch.cos((theta + margin).clamp(max=math.pi)) - subtractive_margin
    target = torch.arange(2 * n, device=z.device).roll(n)
    cosines = (z @ z.T).fill_diagonal_(-torch.inf).scatter(1, target[:, None], positive[:, None])
    return F.cross_entropy(cosines / temperature, target)


# ------------------------------------------------------------------------------------------------------- Augmentation
def crop_and_flip(images, boxes, flips):
    """Cut a box out of each image, resize it to the image's size and mirror it where asked.

    images: (N, 3, H, W) float. boxes: (N, 4) pixels: top, left, height, width. flips: (N,) bool. As torchvision's
    resized_crop (bilinear; nothing outside the box is looked at) and hflip, but a box need not be whole pixels."""
    def sampling_points(start, length, size):  # where grid_sample is to look; -1 and 1 are the image's outer edges
        pixels = (torch.arange(size, device=images.device) + 0.5) / size * length[:, None] - 0.5
        return (2 * (start[:, None] + torch.minimum(pixels.clamp_min(0), length[:, None] - 1)) + 1) / size - 1

    (n, _, height, width), (top, left, box_height, box_width) = images.shape, boxes.unbind(1)
    y, x = sampling_points(top, box_height, height), sampling_points(left, box_width, width)
    x = torch.where(flips[:, None], x.flip(1), x)
    grid = torch.stack([x[:, None, :].expand(n, height, width), y[:, :, None].expand(n, height, width)], dim=3)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def jitter_colors(images, brightness, contrast, saturation, hue, gray):
    """Change the colours of each image by its own amounts: one 3x3 matrix and one offset per image.

    images: (N, 3, H, W) float in [0, 1]. brightness, contrast, saturation: (N,) factors, 1 for no change. hue: (N,) in
    turns of the colour circle. gray: (N,) bool. Returns the same shape, clamped to [0, 1]. Brightness, contrast,
    saturation and grey are torchvision's. Unlike there, the order is fixed, as listed, clamping comes once, at the end,
    and hue turns the RGB cube about its grey axis (the same for thirds of a turn) instead of going through HSV."""
    channel = torch.arange(3, device=images.device)
    # torch.tensor would wait for the GPU
    luma = torch.cat([torch.full((1,), share, device=images.device) for share in (0.2989, 0.587, 0.114)])
    saturate = luma + saturation[:, None, None] * (torch.eye(3, device=images.device) - luma)
    turns = hue[:, None, None] - (channel[:, None] - channel) / 3
    matrix = (1 + 2 * torch.cos(2 * math.pi * turns)) / 3 @ saturate  # a rotation about (1, 1, 1), after saturate
    matrix = torch.where(gray[:, None, None], (luma @ matrix)[:, None], matrix)
    matrix = (brightness * contrast)[:, None, None] * matrix
    offset = (1 - contrast) * brightness * (images.mean((2, 3)) @ luma)  # contrast blends with the image's mean grey
    return torch.baddbmm(offset[:, None, None], matrix, images.flatten(2)).clamp(0, 1).view_as(images)


def augment(images, *, crop_scale=(0.2, 1.0), color_strength=0.5, gray_prob=0.1, flip=True):
    """SimCLR's random view of each image: every image its own draw, the whole batch at once, on its device.

    images: (N, 3, H, W) float in [0, 1]; returns the same. Random resized crop with an area in crop_scale (1: the whole
    image) and an aspect ratio of 3/4 to 4/3, log-uniform: where torchvision tries up to ten boxes until one fits, ten
    are drawn and the first that fits is taken, or else all of the image. Mirrored half of the time if flip. Colour
    jitter with probability 0.8, for a strength s <= 1.25: brightness, contrast, saturation within 1 +- 0.8 s, hue
    +- 0.2 s. Grey with gray_prob."""
    n, _, height, width = images.shape

    def uniform(low, high, *shape):
        return torch.empty(n, *shape, device=images.device).uniform_(low, high)

    area, ratio = height * width * uniform(*crop_scale, 10), uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()
    heights, widths = (area / ratio).sqrt(), (area * ratio).sqrt()
    fits = (heights <= height) & (widths <= width)
    first = fits.int().argmax(1, keepdim=True)
    h, w = (torch.where(fits.any(1), sides.gather(1, first)[:, 0], whole)
            for sides, whole in ((heights, float(height)), (widths, float(width))))
    boxes = torch.stack([uniform(0, 1) * (height - h), uniform(0, 1) * (width - w), h, w], dim=1)
    strength = color_strength * (uniform(0, 1) < 0.8)
    brightness, contrast, saturation = (1 + 0.8 * strength * uniform(-1, 1) for _ in range(3))
    views = crop_and_flip(images, boxes, (uniform(0, 1) < 0.5) & flip)
    hue, gray = 0.2 * strength * uniform(-1, 1), uniform(0, 1) < gray_prob
    return jitter_colors(views, brightness, contrast, saturation, hue, gray)


# --------------------------------------------------------------------------------------------------------------- Data
GLYPHS = {  # name: (characters, {split: (number of images, seed)})
    "glyphs": ("ABCDEFGHIJKLMNOPQRSTUVWXYZ", {"train": (5000, 0), "test": (2000, 1)}),
    "digits": ("0123456789", {"train": (2000, 2), "test": (2000, 3)})}
FONTS = ("DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic "
         "STIXGeneral STIXGeneralBol STIXGeneralItalic cmr10 cmb10 cmss10 cmtt10 cmti10").split()  # inside matplotlib
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST", "svhn": "SVHN",
               "stl10": "STL10"}  # name: torchvision's class


@functools.cache
def glyphs(characters, count, seed, size=32):
    """Characters in random fonts, sizes (22-32 of 32 px), rotations (+-15 degrees), places and colours, lightly noisy.

    Returns images (count, 3, size, size) uint8 and labels (count,) int64, indices into characters (about equally
    often); the same for a seed on the same library versions. Each character is drawn once per font, then warped."""
    folder, generator = Path(matplotlib.get_data_path(), "fonts", "ttf"), torch.Generator().manual_seed(seed)
    stencils = torch.zeros(len(FONTS), len(characters), 1, 48, 48)
    for (i, font), (j, character) in itertools.product(enumerate(FONTS), enumerate(characters)):
        drawing, font = Image.new("L", (48, 48)), ImageFont.truetype(folder / f"{font}.ttf", 32)
        ImageDraw.Draw(drawing).text((24, 24), character, fill=255, font=font, anchor="mm")
        stencils[i, j, 0] = torch.from_numpy(np.array(drawing)) / 255

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    labels = torch.arange(count) % len(characters)
    fonts = torch.randint(len(FONTS), (count,), generator=generator)
    zoom = 32 / 48 * 32 / uniform(22, 32, 1, 1)  # a picture shows 32 of the stencil's 48 pixels, if drawn at size 32
    angle, shift = uniform(-15, 15).deg2rad(), uniform(-0.12, 0.12, 2, 1)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
    grid = F.affine_grid(torch.cat([zoom * rotation, shift], dim=2), (count, 1, size, size), align_corners=False)
    ink = F.grid_sample(stencils[fonts, labels], grid, align_corners=False)
    paper = uniform(0, 1, 3, 1, 1)
    color = (paper + uniform(0.35, 0.65, 3, 1, 1)) % 1  # at least 0.35 from the paper's, in every channel
    images = paper + ink * (color - paper) + 0.03 * torch.randn(count, 3, size, size, generator=generator)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


def as_uint8_images(images, size):
    """(N, H, W), (N, H, W, 3) or (N, 3, H, W) uint8 -> (N, 3, size, size) uint8: resized bilinearly, antialiased."""
    images = torch.as_tensor(images)
    images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images
    images = images.permute(0, 3, 1, 2) if images.shape[1] != 3 else images
    if images.shape[2:] != (size, size):
        images = torch.cat([F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True).round().byte()
                            for chunk in images.split(1000)])
    return images.contiguous()


def read_folder(folder, split, size):
    """Images (N, 3, size, size) uint8 and labels (N,) int64 of folder/split/CLASS/*.png, *.jpg; classes by name."""
    from torchvision.datasets import ImageFolder  # here, as torchvision takes two seconds that glyphs do not need
    with as_user_error(OSError, folder, f"wanted are {folder}/train/CLASS/*.png or *.jpg and {folder}/test/CLASS/*; "
                       "--dataset glyphs needs no files"):
        listings = {part: ImageFolder(Path(folder, part)) for part in ("train", "test")}
    if odd := set(listings["train"].classes) ^ set(listings["test"].classes):
        raise UserError(f"{folder}: {', '.join(sorted(odd))} not in both train and test; give both the same classes")

    def read(path):
        with as_user_error(Exception, f"{path}: not a readable image", "mend or remove it"):
            pixels = np.array(Image.open(path).convert("RGB"))
        return as_uint8_images(torch.from_numpy(pixels).permute(2, 0, 1)[None], size)

    with multiprocessing.pool.ThreadPool() as pool:
        images = pool.map(read, [path for path, _ in listings[split].samples])
    return torch.cat(images), torch.tensor(listings[split].targets)


def load_dataset(name, split, config):
    """Images (N, 3, S, S) uint8 and labels (N,) int64 of a split of any set there is.

    split: "train" or "test", and for STL-10 also "unlabeled". UserError if the set cannot be had."""
    kind, _, folder = name.partition(":")
    if name in GLYPHS:
        characters, splits = GLYPHS[name]
        images, labels = glyphs(characters, *splits[split], config.image_size)
    elif name in TORCHVISION:
        choice = dict(split=split) if name in ("svhn", "stl10") else dict(train=split == "train")
        with as_user_error((OSError, RuntimeError, ImportError), f"{name}: not read from {config.data_dir}, nor "
                           "downloaded", "mend that, or take --dataset glyphs, which needs no download"):
            import torchvision.datasets
            dataset = getattr(torchvision.datasets, TORCHVISION[name])(config.data_dir, download=True, **choice)
        images = as_uint8_images(dataset.data, config.image_size)
        labels = torch.as_tensor(dataset.targets if hasattr(dataset, "targets") else dataset.labels).long()
    elif kind == "folder":
        images, labels = read_folder(folder or config.data_dir, split, config.image_size)
    else:
        raise UserError(f"there is no data set {name!r}; take {', '.join([*GLYPHS, *TORCHVISION])} or folder:DIR")
    if 0 < config.max_images < len(images):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:config.max_images]
        images, labels = images[chosen], labels[chosen]
    return images, labels


def load_data(config):
    """All that a run looks at: (pretraining images, probe sets, hash). A probe set is (name, role, train, test).

    train and test are (images, labels); the first set is the seen one. The hash is of every pixel and label: a run goes
    on only with the images it began with. With config.validation no test image is read: a fifth of the training images
    takes their place, kept out of pretraining and of the probe's fit. UserError if a set cannot be had."""
    if LOCAL_RANK > 0:
        dist.barrier()  # until the first process of this machine has downloaded
    sets, digest = [], hashlib.sha256()
    for name in (config.dataset, *config.probe_dataset):
        images, labels = train = load_dataset(name, "train", config)
        if config.validation:
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
            test, train = ((images[part], labels[part]) for part in order.tensor_split([len(order) // 5]))
        else:
            test = load_dataset(name, "test", config)
        sets.append((name, "unseen" if sets else "seen", train, test))
    pretrain = load_dataset("stl10", "unlabeled", config)[0] if config.dataset == "stl10" else sets[0][2][0]
    for tensor in (pretrain, *(tensor for _, _, train, test in sets for tensor in (*train, *test))):
        digest.update(tensor.numpy())
    if LOCAL_RANK == 0 and WORLD > 1:
        dist.barrier()
    if config.batch_size > len(pretrain):
        raise UserError(f"a batch of {config.batch_size} is more than the {len(pretrain)} images; lower --batch-size")
    return pretrain, sets, digest.hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------------- Model
class Model(nn.Module):
    """An encoder, whose features h are the aim, and a projector to the embeddings z that the loss compares.

    model(x): (N, 3, H, W) float in [0, 1] -> h (N, F) and z (N, 128), F = 192 for "small" and 512 for "resnet18". The
    BatchNorm at the projector's end spreads the embeddings from the first step; without it they start in a bundle."""

    def __init__(self, encoder):
        super().__init__()
        if encoder == "resnet18":  # for small photographs: a 3x3 stem, no max-pool
            from torchvision.models import resnet18
            self.encoder, features = resnet18(weights=None), 512
            self.encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            self.encoder.maxpool = self.encoder.fc = nn.Identity()
        else:  # 2x2 positions stay apart: a letter is where its strokes are
            def block(inputs, outputs, pool, stride):
                return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.MaxPool2d(pool),
                                     nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
            self.encoder, features = nn.Sequential(block(3, 16, 1, 2), block(16, 24, 2, 1), block(24, 48, 2, 1),
                                                   nn.AdaptiveMaxPool2d(2), nn.Flatten()), 192
        self.projector = nn.Sequential(
            nn.Linear(features, 2 * features), nn.BatchNorm1d(2 * features), nn.ReLU(inplace=True),
            nn.Linear(2 * features, 128), nn.BatchNorm1d(128, affine=False))

    def forward(self, x):
        h = self.encoder(x)
        return h, self.projector(h)


# --------------------------------------------------------------------------------------------------------- Evaluation
@torch.no_grad()
def extract_features(model, images):
    """Features (N, F) float32, on the model's device, of images (N, 3, H, W) uint8; the model stays as it is."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    features = torch.cat([model.encoder(batch.to(device).float() / 255) for batch in images.split(500)])
    model.train(was_training)
    return features


def linear_probe(h_train, y_train, h_test, y_test, *, l2=1e-2):
    """Test accuracy in percent of multinomial logistic regression on features standardised by the training features.

    h_*: (N, F) float, y_*: (N,) int64. Minimises cross-entropy + l2 / 2 * |weights|^2 (the biases are free) by L-BFGS
    with strong Wolfe line search, from zero to a gradient below 1e-5, at most 200 iterations: convex, deterministic."""
    mean, std = h_train.mean(0), h_train.std(0).clamp_min(1e-6)
    x_train, x_test = (F.pad((h - mean) / std, (0, 1), value=1.0) for h in (h_train, h_test))
    weights = x_train.new_zeros(x_train.shape[1], int(max(y_train.max(), y_test.max())) + 1).requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=200, max_eval=1000, tolerance_grad=1e-5, tolerance_change=0,
                                  history_size=20, line_search_fn="strong_wolfe")

    def closure():
        loss = F.cross_entropy(x_train @ weights, y_train) + l2 / 2 * weights[:-1].square().sum()
        weights.grad, = torch.autograd.grad(loss, weights)
        return loss

    optimizer.step(closure)
    return 100 * ((x_test @ weights).argmax(1) == y_test).sum().item() / len(y_test)


def knn(h_train, y_train, h_test, y_test, *, k=10):
    """Test accuracy in percent of the majority among the k nearest training features by cosine; ties to the nearest.

    h_*: (N, F) float, y_*: (N,) int64. The r-th neighbour's vote counts 1 + 2^-r: the fractions never add up to a vote,
    but among classes with as many votes they favour that of the nearest neighbour."""
    h_train, h_test, k = F.normalize(h_train), F.normalize(h_test), min(k, len(h_train))
    vote, correct = 1 + 0.5 ** torch.arange(1, k + 1).to(h_train), 0
    for h, y in zip(h_test.split(1000), y_test.split(1000)):
        neighbours = y_train[(h @ h_train.T).topk(k).indices]
        votes = h.new_zeros(len(h), int(y_train.max()) + 1).scatter_add_(1, neighbours, vote.expand_as(neighbours))
        correct += (votes.argmax(1) == y).sum().item()
    return 100 * correct / len(y_test)


def probe(model, sets):
    """[(linear, kNN)] accuracies in percent of the model's frozen features, for each probe set of load_data."""
    accuracies = []
    for _, _, (x_train, y_train), (x_test, y_test) in sets:
        h_train, h_test = extract_features(model, x_train), extract_features(model, x_test)
        data = h_train, y_train.to(h_train.device), h_test, y_test.to(h_test.device)
        accuracies.append((linear_probe(*data), knn(*data)))
    return accuracies


# ----------------------------------------------------------------------------------------------------------- Training
FACTORS = "E", "D", "A", "log_E", "log_D", "log_A"
UNTRAINED = {}  # {(encoder, seed, data hash): probe of the untrained encoder}, which a process works out once


def write_file(path, content):
    """Write bytes, rows (as CSV), a dict (JSON) or a Figure (PNG) so that path never holds half of it."""
    if isinstance(content, dict):
        content = json.dumps(content, indent=2).encode()
    elif isinstance(content, list):
        text, rows = io.StringIO(), [content[0] if content else [], *(row.values() for row in content)]
        csv.writer(text, lineterminator="\n").writerows(rows)
        content = text.getvalue().encode()
    elif isinstance(content, Figure):
        content.savefig(picture := io.BytesIO(), format="png", dpi=150)
        content = picture.getvalue()
    partial = path.with_name(path.name + ".partial")
    with as_user_error(OSError, f"cannot write {path}", "what it held is unchanged; mend that, then --resume"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read_checkpoint(folder):
    """The checkpoint of a run folder, a dict with its Config and Model restored. UserError if it cannot be read.

    weights_only: whatever is in the file, none of it is executed."""
    path = Path(folder, "checkpoint.pt")
    if not path.is_file():
        raise UserError(f"there is no {path}; --resume takes the folder of a run that has begun")
    with as_user_error(Exception, f"{path}: damaged, or no checkpoint", "start the run anew"):
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    with as_user_error((TypeError, LookupError, ValueError, RuntimeError),
                       f"{path}: of another version of this program", "use that version"):
        if state["schema"] != SCHEMA:
            raise ValueError(f"schema {state['schema']}, not {SCHEMA}")
        config = Config(**state["config"])
        model = Model(config.encoder)
        model.load_state_dict(state["model"])
        return dict(config=config, model=model, **{name: state[name] for name in ("optimizer", "history", "started")})


def load_model(folder):
    """The trained Model of a run folder, on the CPU, in eval mode. UserError if its checkpoint cannot be read."""
    return read_checkpoint(folder)["model"].eval()


def make_folder(config):
    """A new folder for a run under config.out; one that exists is never taken."""
    strengths = f"E{config.emphasis:g}D{config.deemphasis:g}A{config.attenuation:g}"
    name = f"{config.dataset}-margin{config.margin:g}-{strengths}-seed{config.seed}"
    with as_user_error(OSError, f"cannot make a folder in {config.out}", "choose another --out"):
        Path(config.out).mkdir(parents=True, exist_ok=True)
        for suffix in itertools.chain([""], (f"-{number}" for number in itertools.count(2))):
            with contextlib.suppress(FileExistsError):
                Path(config.out, name + suffix).mkdir()
                return Path(config.out, name + suffix)


def pick_device(name):
    """The torch.device of that name; "auto": cuda if there is one, else mps, else cpu. UserError if it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with as_user_error((RuntimeError, AssertionError), f"cannot use device {name}", "try --device cpu"):
        torch.empty(1, device=name)
    return torch.device(name)


def gather(z):
    """(n, D) embeddings of this process -> (WORLD * n, D) of all; only this process's own rows carry a gradient.

    Every process computes the loss of the whole batch, all anchors in it: its own rows get their whole gradient."""
    if WORLD == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(WORLD)]
    dist.all_gather(parts, z.detach())
    parts[RANK] = z
    return torch.cat(parts)


def backward(loss, network):
    """loss.backward(), and the weights' gradients added up over the processes: each had only its own rows' share."""
    loss.backward()
    if WORLD > 1:
        for weight in network.parameters():
            dist.all_reduce(weight.grad)


def train_epoch(network, optimizer, images, epoch, config, live=False):
    """One pass over images (N, 3, H, W) uint8, on the network's device, in full batches (config: resolved, amp set).

    Returns the epoch's row of metrics.csv, a dict of means: loss (NT-Xent, in nats), angle_degrees of the positives, E,
    D, A and their logs (log_D counts as -5 where D is smaller), past_crossover (the share of anchors at which D acts);
    lr is the last step's. live: print each step. The randomness is seeded by (seed, epoch, process): to resume, weights
    and momenta are enough. Nothing waits for the GPU before the end. Diverged if a loss or a weight is not finite."""
    start, device, steps, measured = time.perf_counter(), images.device, len(images) // config.batch_size, []
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch))
    batches = order[:steps * config.batch_size].view(steps, -1)[:, RANK::WORLD].to(device)
    torch.manual_seed((config.seed * 1_000_003 + epoch) * 1_009 + RANK)
    network.train()
    for step, batch in enumerate(batches):
        progress = (epoch + (step + 0.5) / steps) / config.epochs
        rise = progress / max(config.warmup, 1e-9)  # 1 when the warm-up is over; from there fall goes from 0 to 1
        fall = max(progress - config.warmup, 0) / max(1 - config.warmup, 1e-9)
        schedule = min(rise, 0.5 + 0.5 * math.cos(math.pi * fall))
        optimizer.param_groups[0]["lr"] = lr = schedule * config.lr * config.batch_size / 256
        views = augment(images[batch].float().div(255).repeat(2, 1, 1, 1), crop_scale=(config.crop_min, 1.0),
                        color_strength=config.color_strength, gray_prob=config.gray_prob, flip=config.flip)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            _, z = network(views.contiguous(memory_format=torch.channels_last))
        z1, z2 = map(gather, z.chunk(2))
        loss, c, *log_factors = margin_contrastive_loss(z1, z2, **config.loss_arguments(), return_factors=True)
        optimizer.zero_grad()
        backward(loss, network)
        optimizer.step()
        angles, log_factors = c.clamp(-1, 1).acos(), torch.stack(log_factors)
        past_crossover = (angles > (math.pi - config.margin) / 2).float()
        measured.append(torch.stack([loss.detach(), angles.rad2deg().mean(), *log_factors.exp().mean(1),
                                     *log_factors.clamp_min(-5).mean(1), past_crossover.mean()]))
        if live:
            print(f"epoch {epoch + 1}  step {step + 1}/{steps}", end="\r", flush=True)
    measured = torch.stack(measured).cpu()
    finite = int(measured[:, 0].isfinite().sum())
    if finite < steps or not all(weight.isfinite().all() for weight in network.parameters()):
        raise Diverged(f"epoch {epoch + 1}, step {min(finite + 1, steps)}: a loss or weight is not finite; the last "
                       "checkpoint is kept. Lower --lr, raise --temperature or bring the strengths nearer to 1")
    names = "loss", "angle_degrees", *FACTORS, "past_crossover"
    seconds = time.perf_counter() - start
    return dict(epoch=epoch + 1, **dict(zip(names, measured.mean(0).tolist())), lr=lr, seconds=seconds,
                images_per_second=steps * config.batch_size / seconds)


COLORS = dict(E="#0072B2", D="#D55E00", A="#009E73")  # of Okabe and Ito's palette, for colour-blind readers too


def draw_curves(history):
    """A Figure of a run, epoch by epoch: NT-Xent's value, the positives' mean angle, the mean log factors."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, label, names in zip(
            figure.subplots(1, 3), ("NT-Xent (nats)", "mean positive angle (degrees)", "mean log factor"),
            ({"loss": "k"}, {"angle_degrees": "k"}, {f"log_{letter}": color for letter, color in COLORS.items()})):
        for (name, color), marker in zip(names.items(), "osv"):
            axes.plot(*zip(*((row["epoch"], row[name]) for row in history)), f"{marker}-", color=color, label=name)
        axes.set(xlabel="epoch", ylabel=label)
    axes.legend(frameon=False)  # of the last plot
    return figure


def run(config, on_epoch=None, *, folder=None, verbose=True):
    """One whole run: data, untrained probe, pretraining, probe, files. Returns the dict of results.json plus "folder".

    on_epoch(row, model), if given, is called after each epoch with its row of metrics.csv. folder: where to run, if not
    in a new folder under config.out; a run that has begun there, with these very settings, goes on. UserError, or
    ValueError for a setting, for what a user can mend. Of several processes the first probes and writes; others return
    {}."""
    config, device = config.resolve(), pick_device(config.device)
    config = replace(config, amp=device.type == "cuda" if config.amp is None else config.amp)
    talk = verbose and RANK == 0
    say, live = print if talk else lambda *_: None, talk and sys.stdout.isatty()
    torch.backends.cudnn.benchmark = True
    begun = read_checkpoint(folder) if folder and Path(folder, "checkpoint.pt").exists() else None
    pretrain, sets, data_hash = load_data(config)
    started = asdict(config) | {"the hash of the images": data_hash, "the number of processes": WORLD}
    for name, value in begun["started"].items() if begun else ():
        if started[name] != value:
            raise UserError(f"{name} is {value} in {folder}, not {started[name]}; a run goes on as it began")

    torch.manual_seed(config.seed)
    model = Model(config.encoder).to(device, memory_format=torch.channels_last)
    key = config.encoder, config.seed, data_hash
    if RANK == 0 and key not in UNTRAINED:
        UNTRAINED[key] = probe(model, sets)  # with BatchNorm's initial statistics: mean 0, variance 1
    if WORLD > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay,
                                fused=device.type == "cuda")
    history = begun["history"] if begun else []
    if begun:
        model.load_state_dict(begun["model"].state_dict())
        optimizer.load_state_dict(begun["optimizer"])
    network = torch.compile(model) if config.compile else model
    folder = Path(folder) if folder else make_folder(config) if RANK == 0 else None

    def save():
        if RANK == 0:
            state = io.BytesIO()
            torch.save(dict(schema=SCHEMA, config=asdict(config), started=started, history=history,
                            model=model.state_dict(), optimizer=optimizer.state_dict()), state)
            write_file(folder / "checkpoint.pt", state.getvalue())
            write_file(folder / "config.json", asdict(config))
            write_file(folder / "metrics.csv", history)

    try:
        say(f"{config.dataset}: {len(pretrain):,} images, {config.encoder} encoder, {device}; run folder {folder}")
        save()
        images = pretrain.to(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for epoch in range(len(history), config.epochs):
            history.append(row := train_epoch(network, optimizer, images, epoch, config, live))
            save()
            say("epoch {epoch}/{}  NT-Xent {loss:.3f}  angle {angle_degrees:.1f} deg  E {E:.3f}  D {D:.3f}  A {A:.3f}  "
                "{images_per_second:,.0f} images/s  {:.0f} s left".format(
                    config.epochs, (config.epochs - epoch - 1) * row["seconds"], **row))
            if on_epoch:
                on_epoch(row, model)
        memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
        trained = probe(model, sets) if RANK == 0 else []
    except KeyboardInterrupt:
        say(f"\nstopped, without the epoch in progress. To go on: python margin_contrastive.py --resume {folder}")
        raise
    if RANK > 0:
        return {}

    probes = [dict(dataset=name, role=role, classes=int(train[1].max()) + 1, n_train=len(train[1]), n_test=len(test[1]),
                   linear=linear, knn=nearest, random_linear=random_linear, random_knn=random_nearest)
              for (name, role, train, test), (linear, nearest), (random_linear, random_nearest)
              in zip(sets, trained, UNTRAINED[key])]
    seconds = sum(row["seconds"] for row in history)
    results = dict(
        schema=SCHEMA, config=asdict(config), data_hash=data_hash, probes=probes,
        versions={name: importlib.metadata.version(name) for name in ("torch", "torchvision", "matplotlib", "pillow")},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        train=dict(seconds=seconds, epochs=len(history), peak_memory_mb=memory,
                   images_per_second=sum(row["seconds"] * row["images_per_second"] for row in history) / seconds,
                   **{f"mean_{name}": sum(row[name] for row in history) / len(history) for name in FACTORS}))
    write_file(folder / "curves.png", draw_curves(history))
    write_file(folder / "results.json", results)
    return results | {"folder": str(folder)}


# ----------------------------------------------------------------------------------------------------------- Ablation
LETTERS = dict(E="emphasis", D="deemphasis", A="attenuation")
OFF, ON = (dict.fromkeys(LETTERS.values(), s) | dict(positive_scale=1.0) for s in (0.0, 1.0))  # NT-Xent, the margin


def sweeps(config):
    """{sweep: {setting: {knob: value}}}; the first setting of each is plain NT-Xent, the others' reference."""
    subsets = [subset for size in range(4) for subset in itertools.combinations(LETTERS, size)]
    reference, dials = {"NT-Xent": OFF}, list(LETTERS.items())
    return {
        "switches": {"+".join(subset) or "NT-Xent": OFF | {LETTERS[letter]: 1.0 for letter in subset}
                     for subset in subsets},
        "dials": reference | {f"{letter} x {s:g}": OFF | {name: s} for letter, name in dials
                              for s in (-1.0, 0.5, 1.0, 2.0, 3.0)},
        "dials-in-margin": reference | {"E+D+A": ON} | {f"E+D+A, {letter} x {s:g}": ON | {name: s}
                                                        for letter, name in dials for s in (-1.0, 0.0, 0.5, 2.0)},
        "positive-scale": reference | {f"pull x {s:g}": OFF | dict(positive_scale=s)
                                       for s in (0.5, 0.7, 0.85, 1.2, 1.4, 2.0)},
        "margins": reference | {f"m = {m:g}": ON | dict(margin=m) for m in (0.05, 0.1, 0.2, 0.4, 0.8)}
                   | {f"m2 = {m2:g}": ON | dict(margin=0.0, subtractive_margin=m2) for m2 in (0.1, 0.2, 0.4, 0.8)},
        "nt-xent": reference | {f"tau {tau:g}, lr {lr:g}" + f", pull x {pull:g}" * (pull != 1):
                                OFF | dict(temperature=tau, lr=lr, positive_scale=pull) for pull in (1.0, 0.7)
                                for tau in (0.05, 0.1, 0.2) for lr in (config.lr * 2.0**i for i in range(-2, 3))}}


def matched_controls(rows, config):
    """Two settings blind to angle and probability: the E+D+A rows' mean E * D and mean A, as constants.

    No settings if no row of E+D+A is finite."""
    full = [row for row in rows if row["setting"] == "E+D+A" and math.isfinite(row["A"])]
    if not full:
        return {}
    E, D, A = (sum(row[name] for row in full) / len(full) for name in "EDA")
    scale, lr = max(round(E + D - 1, 3), 1e-3), round(A, 3)  # E + D - 1: the mean of E * D, as one is always 1
    return {f"pull x {scale:g}": OFF | dict(positive_scale=scale),
            f"lr x {lr:g}": OFF | dict(lr=min(config.lr * lr, 1e3))}


def ablation_run(job):
    """One run of an ablation, if it has not finished: (Config, folder) -> accuracies in percent and mean factors.

    nan for the accuracies on unseen sets if there are none (if several: their mean), for everything if it diverges."""
    config, folder = job
    row = dict.fromkeys(("seen_linear", "seen_knn", "unseen_linear", "unseen_knn", *FACTORS), math.nan)
    finished = folder / "results.json"
    try:
        results = json.loads(finished.read_text()) if finished.exists() else run(config, folder=folder, verbose=False)
    except Diverged:
        return row
    for role, kind in itertools.product(("seen", "unseen"), ("linear", "knn")):
        if accuracies := [probed[kind] for probed in results["probes"] if probed["role"] == role]:
            row[f"{role}_{kind}"] = sum(accuracies) / len(accuracies)
    return row | {name: results["train"][f"mean_{name}"] for name in FACTORS}


def start_worker(threads):
    """What each process of an ablation does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)


def ablate(settings, seeds, config, folder, say=print):
    """Run named overrides of config with every seed; under one seed all have the same first weights, batches and views.

    settings: {name: {knob: value}}, the reference first. Returns a dict per run: setting, seed, accuracies in percent,
    mean factors (nan for a run that diverges); writes these to folder/runs.csv, and summarise's table of them to
    table.csv. What has finished there is not run again, what has begun goes on. On a CPU, runs of one thread each go
    side by side, which is faster. A script that calls it needs an `if __name__ == "__main__":`. Raises UserError."""
    jobs, rows, done, start = [], [], 0, time.perf_counter()
    data_hash = load_data(config.resolve())[2]  # here too, so that the workers do not download side by side
    for seed, (setting, overrides) in itertools.product(seeds, settings.items()):
        with as_user_error(ValueError, f"invalid setting of {setting}", "leave it out"):
            job = replace(config, **overrides, seed=seed).resolve()
        digest = hashlib.sha256(json.dumps([asdict(job), data_hash]).encode()).hexdigest()[:8]
        slug = "".join(character if character.isalnum() else "_" for character in setting)
        jobs.append((job, Path(folder, f"{slug}-seed{seed}-{digest}")))
    todo = [not (job_folder / "results.json").exists() for _, job_folder in jobs]
    say(f"{len(settings)} settings x {len(seeds)} seeds: {sum(todo)} of {len(jobs)} runs to do, in {folder}")
    cpu, threads = pick_device(config.device).type == "cpu", torch.get_num_threads()
    workers, threads = (min(threads, sum(todo)) or 1, 1) if cpu else (1, threads)
    with multiprocessing.get_context("spawn").Pool(workers, start_worker, (threads,)) as pool:
        for setting, (job, _), new, row in zip(itertools.cycle(settings), jobs, todo, pool.imap(ablation_run, jobs)):
            rows.append(dict(setting=setting, seed=job.seed, **row))
            if new:
                done += 1
                left = (time.perf_counter() - start) * (sum(todo) / done - 1)
                say(f"{done:3}/{sum(todo)}  {setting:18} seed {job.seed}  seen {row['seen_linear']:.1f}%  "
                    f"unseen {row['unseen_linear']:.1f}%  {left:.0f} s left")
    write_file(Path(folder, "runs.csv"), rows)
    write_file(Path(folder, "table.csv"), summarise(rows))
    return rows


def summarise(rows):
    """A dict per setting of ablate's rows: each column's mean over the seeds, the mean of its paired difference to the
    first setting ("..._difference"), and the standard errors of both ("..._se", nan for a single seed)."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    columns = [name for name in rows[0] if name not in ("setting", "seed")]
    values = torch.tensor([[row[name] for name in columns] for row in rows], dtype=torch.float64)
    values = values.view(-1, len(settings), len(columns))  # by seed, setting, column
    table = [dict(setting=setting, seeds=len(values)) for setting in settings]
    for suffix, x in ("", values), ("_difference", values - values[:, :1]):
        errors = ((x - x.mean(0)).square().sum(0) / (len(x) - 1) / len(x)).sqrt()
        for row, means, standard_errors in zip(table, x.mean(0).tolist(), errors.tolist()):
            for name, mean, error in zip(columns, means, standard_errors):
                row |= {name + suffix: mean, f"{name}{suffix}_se": error}
    return table


def draw_ablation(rows):
    """A Figure of the linear probes, less the first setting's of that seed: a dot for a seed, a bar for the mean."""
    table = summarise(rows)
    settings = [row["setting"] for row in table]
    reference = {row["seed"]: row for row in rows if row["setting"] == settings[0]}
    figure = Figure(figsize=(9, 1.2 + 0.25 * len(settings)), layout="constrained")
    for axes, role in zip(figure.subplots(1, 2, sharex=True, sharey=True), ("seen", "unseen")):
        for row in rows:
            above = row[f"{role}_linear"] - reference[row["seed"]][f"{role}_linear"]
            axes.plot(above, settings.index(row["setting"]), "ko", alpha=0.4)
        axes.plot([row[f"{role}_linear_difference"] for row in table], range(len(table)), "k|", markersize=18)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(xlabel=f"linear probe, {role}: points above {settings[0]}", yticks=range(len(settings)))
    axes.set(yticklabels=settings, ylim=(len(settings) - 0.5, -0.5))
    return figure


def print_table(rows):
    """Print the linear probes of summarise's table, with the mean log factors."""
    width = max(18, *(len(row["setting"]) + 1 for row in rows))
    print(f"\nlinear probe in %, and its difference to {rows[0]['setting']} paired by seed: mean +- standard error\n"
          f"{'setting':{width}}{'seeds':>5}{'seen':>14}{'difference':>14}{'unseen':>14}{'difference':>14}"
          f"{'log E':>9}{'log D':>9}{'log A':>9}")
    for row in summarise(rows):
        cells = [f"{row[name]:{sign}.1f} +- {row[name + '_se']:.1f}" for role in ("seen", "unseen")
                 for name, sign in ((f"{role}_linear", ""), (f"{role}_linear_difference", "+"))]
        print(f"{row['setting']:{width}}{row['seeds']:5}" + "".join(f"{cell:>14}" for cell in cells)
              + "".join(f"{row[name]:9.4f}" for name in ("log_E", "log_D", "log_A")))


# ------------------------------------------------------------------------------------------------------- Command line
def make_parser():
    """The command line: a flag for each knob of Config, and those that are about more than one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (--help explains every flag)\n")
    for f in fields(Config):
        flag, default = "--" + f.name.replace("_", "-"), f.default
        text, choices = f.metadata["help"], f.metadata["choices"]
        if f.name in PHOTOGRAPHS and f.type is not tuple:
            default, other = PRESETS["glyphs"][f.name], PHOTOGRAPHS[f.name]
            default = default if default == other else f"{default} for glyphs, {other} for photographs"
        text += "" if default is None else f" (default: {default})"
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif f.type is tuple:
            parser.add_argument(flag, action="append", metavar="NAME", help=text)
        else:
            parser.add_argument(flag, type=f.type, choices=choices, help=text,
                                metavar=None if choices else f.type.__name__.upper())
        if f.name in LETTERS.values():
            parser.add_argument(f"--no-{f.name}", dest=f.name, action="store_const", const=0.0, help=f"{flag} 0")
    names = list(sweeps(Config().resolve()))
    parser.add_argument("--resume", metavar="RUN_FOLDER", help="go on with a run that was stopped, as it began")
    parser.add_argument("--ablate", nargs="?", const="switches", choices=names, metavar="SWEEP",
                        help="run a sweep instead, which sets the strengths itself: "
                             f"{', '.join(names)} (--ablate alone: switches)")
    parser.add_argument("--seeds", type=int, help="number of seeds of a sweep (default: 3)")
    return parser


def report(results):
    """Print the end of a run: the probes of the untrained and the trained encoder, the time, where the files are."""
    print("\naccuracy in %            linear probe         kNN (k = 10)\n"
          "probed on            untrained  trained   untrained  trained")
    for row in results["probes"]:
        print(f"{row['dataset'] + ' (' + row['role'] + ')':20} {row['random_linear']:9.1f} {row['linear']:8.1f}   "
              f"{row['random_knn']:9.1f} {row['knn']:8.1f}")
    print("{epochs} epochs in {seconds:.1f} s, {images_per_second:,.0f} images/s\n"
          "results.json, metrics.csv, curves.png and checkpoint.pt are in {folder}".format(
              **results["train"] | results))


def main(argv=None):
    """The command line. Exit status 0; 2, with one line that says why, for what the user can mend; 130 after Ctrl-C."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    folder, sweep, count = given.pop("resume", None), given.pop("ablate", None), given.pop("seeds", None)
    if count is not None and (count < 1 or not sweep):
        parser.error(f"seeds goes with --ablate and must be at least 1, not {count}")
    if sweep and (folder or WORLD > 1):
        parser.error("a sweep goes on by itself, without --resume, and needs no torchrun")
    try:
        with as_user_error(ValueError, "invalid setting", "--help explains every flag"):
            config = replace(read_checkpoint(folder)["config"] if folder else Config(), **given).resolve()
        if sweep in (None, "switches", "dials", "dials-in-margin") and not (config.margin or config.subtractive_margin):
            print("warning: both margins are 0, so that E = D = A = 1 and no switch has an effect", file=sys.stderr)
        elif sweep is None and not any(getattr(config, name) for name in LETTERS.values()):
            print("warning: emphasis, deemphasis and attenuation are all 0: the margin has no effect", file=sys.stderr)
        if WORLD > 1:
            cuda = torch.cuda.is_available() and config.device in ("auto", "cuda")
            if cuda:
                with as_user_error(RuntimeError, f"no GPU number {LOCAL_RANK}", "start as many processes as there are"):
                    torch.cuda.set_device(LOCAL_RANK)
            dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=3))
        if not sweep:
            if results := run(config, folder=folder):
                report(results)
            return
        settings, seeds = sweeps(config)[sweep], range(config.seed, config.seed + (count or 3))
        name = f"ablation-{sweep}-{config.dataset}-{config.regime}" + "-validation" * config.validation
        folder = Path(config.out, name)
        rows = ablate(settings, seeds, config, folder)
        if sweep == "switches":
            rows = ablate(settings | matched_controls(rows, config), seeds, config, folder)
        write_file(folder / "figure.png", draw_ablation(rows))
        print_table(rows)
        print(f"files: runs.csv, table.csv and figure.png in {folder}")
    except (UserError, torch.OutOfMemoryError) as error:
        advice = "" if isinstance(error, UserError) else "lower --batch-size or --image-size: "
        parser.exit(2, f"{parser.prog}: {advice}{str(error).splitlines()[0]}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on from here\n" if sweep else None)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
