"""Margins in contrastive learning: what a margin does to the gradient, one effect at a time.

An encoder sees two random views of each image. A contrastive loss pulls the two views of an image
together (the positive pair) and pushes the views of all other images away (the negatives). A margin
m makes a positive pair look m radians farther apart than it is. Rho et al. (arXiv:2306.11526,
abstract of v1) found that this changes the gradient in three ways. In this project's reading they
are three exact factors on the gradient of NT-Xent, SimCLR's loss, each with a switch:

    E  emphasis, at least 1     pulls near pairs harder                          --no-emphasis
    D  de-emphasis, at most 1   pulls wide pairs more softly                     --no-deemphasis
    A  attenuation, at least 1  keeps the gradient of a good pair from dying     --no-attenuation
                                (it attenuates the gradient's diminishing)

All three on is the gradient of the margin loss, all three off that of NT-Xent. Near means closer
than (pi - m) / 2, which is 84 degrees for the usual m = 0.2.

    python margin_contrastive.py --margin 0.2 --no-attenuation   train on letters, then probe
    python margin_contrastive.py --ablate                        all switches, and a weaker pull

Sections 1 to 5 are the lesson: loss, views, encoder, training, probes. Then come data, settings,
runs, ablation and command line.
"""

import argparse
import csv
import functools
import itertools
import json
import math
import multiprocessing
import pickle
import re
import signal
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

# torchvision is imported where it is used: that takes two seconds, and letters do not need it

# ---- 1. Loss -------------------------------------------------------------------------------------
# For one anchor: c = cos(theta) with its positive, others = logsumexp of cos(theta_k) / tau over
# its negatives k, and u = others - c / tau. The positive's softmax probability is
# p = exp(c / tau) / (exp(c / tau) + exp(others)) = sigmoid(-u). With d() for a small change:
#   NT-Xent    L = -log p = softplus(u),  dL = sigmoid(u) * (d(others) - dc / tau)
#   Margin m   cos(theta + m) in place of c adds delta = (c - cos(theta + m)) / tau to u, and
#              d(cos(theta + m)) = g * dc with g = sin(theta + m) / sin(theta), so that
#              dL = sigmoid(u + delta) * (d(others) - g * dc / tau)
#   Factors    g = E * D, with E = max(g, 1), D = min(g, 1);  A = sigmoid(u + delta) / sigmoid(u)
#              dL = sigmoid(u) * A * (d(others) - E * D * dc / tau)
# E and D act on the positive, A on all that the anchor does, its push on the negatives included.
# g is above 1, so that E acts, while theta < (pi - m) / 2; beyond, D acts. Past theta = pi - m the
# shifted angle stays at pi: its cosine is -1, and g and D are 0. As theta nears 0, E grows without
# bound, but the pull on theta does not: dc = -sin(theta) d(theta), and E * sin(theta) is
# sin(theta + m).


def pair_terms(z1, z2, *, temperature):
    """c and others, as defined above, of all 2N views of a batch as anchors: two tensors (2N,).

    z1, z2: (N, dim) embeddings of the two views of N >= 2 images, normalised here. The result is
    float64 if they are, else float32. ValueError for other shapes.
    """
    if z1.shape != z2.shape or z1.ndim != 2 or len(z1) < 2:
        raise ValueError(f"not (N, dim) twice, N >= 2: {tuple(z1.shape)}, {tuple(z2.shape)}")
    n = len(z1)
    with torch.autocast(z1.device.type, enabled=False):  # a caller's autocast would halve precision
        z = torch.cat([z1, z2])
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)))
        c = (z[:n] * z[n:]).sum(dim=1).repeat(2)
        logits = (z / temperature) @ z.T
        # rows and columns i and i + n are one image: the anchor or its positive, not a negative
        same_image = torch.eye(n, dtype=torch.bool, device=z.device).repeat(2, 2)
        others = logits.masked_fill_(same_image, -torch.inf).logsumexp(dim=1)
    return c, others


@torch.no_grad()
def gradient_factors(c, u, *, temperature, margin, subtractive_margin=0.0):
    """(E, D, log A) of a margin in radians, each of the shape of c and u, as defined above.

    A constant subtractive_margin, taken off the cosine, adds to delta and leaves g as it is: it
    acts through A only. A can be as large as exp(delta), so its logarithm is returned.
    """
    # sin(theta) is 0 at theta = 0 and pi, where eps keeps g finite
    sin = ((1 - c) * (1 + c)).clamp(min=torch.finfo(c.dtype).eps).sqrt()
    g = math.cos(margin) + math.sin(margin) * c / sin  # = sin(theta + margin) / sin(theta)
    shifted = c * math.cos(margin) - sin * math.sin(margin)  # = cos(theta + margin)
    shifted = torch.where(g > 0, shifted, -1.0)  # g is negative where theta + margin is past pi
    delta = (c - shifted + subtractive_margin) / temperature
    log_A = F.logsigmoid(u + delta) - F.logsigmoid(u)
    E = g.clamp(min=1)
    D = g.clamp(min=0, max=1)
    return E, D, log_A


RANGES = {  # of margin_loss's settings; within them every product is finite in float32
    "temperature": (1e-6, 1e6),
    "margin": (0, 3.14),  # radians; at pi nothing would be pulled
    "subtractive_margin": (0, 1e6),
    "emphasis": (0, 4),  # the exponents of E, D and A; D can be 0, and 0**-1 is infinite
    "deemphasis": (0, 4),
    "attenuation": (0, 4),
    "positive_scale": (1e-6, 1e6),
}


def check_range(**settings):
    """ValueError unless each is a number in its range: not nan, and not a tensor to be learned."""
    for name, value in settings.items():
        low, high = RANGES[name]
        if isinstance(value, torch.Tensor) or not low <= value <= high:
            raise ValueError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")


def margin_loss(
    c,
    others,
    *,
    temperature=0.2,
    margin=0.2,
    subtractive_margin=0.0,
    emphasis=1.0,
    deemphasis=1.0,
    attenuation=1.0,
    positive_scale=1.0,
):
    """NT-Xent with its gradient scaled as a margin scales it, each of the three effects apart.

    c, others: of one shape, as defined above, wherever they come from (a batch, a queue); an anchor
    with others -inf, no negatives, has loss and gradient 0. margin is an angle in radians,
    subtractive_margin a cosine. emphasis, deemphasis and attenuation are strengths, the exponents
    of E, D and A: 1 as in the margin, 0 off. positive_scale, a constant on the pull of every
    positive, is there to compare E and D with. Returns a scalar with NT-Xent's *value*, which
    compares across settings; the margin is in its first-order gradient alone. ValueError for unlike
    shapes, a setting out of range or a tensor as a setting: of a learned temperature use .item().
    """
    if c.shape != others.shape:
        raise ValueError(f"c and others differ: {tuple(c.shape)}, {tuple(others.shape)}")
    check_range(temperature=temperature, margin=margin, subtractive_margin=subtractive_margin)
    check_range(emphasis=emphasis, deemphasis=deemphasis, attenuation=attenuation)
    check_range(positive_scale=positive_scale)
    # float32 at least: half precision is too coarse for what is exponentiated
    c = c.to(torch.promote_types(c.dtype, torch.float32))
    # a very negative number in place of -inf, of which log A, a difference, would be nan
    others = others.to(c.dtype).clamp(min=-1e30)
    u = others - c / temperature
    E, D, log_A = gradient_factors(
        c, u, temperature=temperature, margin=margin, subtractive_margin=subtractive_margin
    )
    pull = positive_scale * E**emphasis * D**deemphasis
    # sigmoid(u) * A**attenuation, by logarithms: sigmoid(u)**(1 - a) * sigmoid(u + delta)**a, which
    # is at most 1 for a <= 1; beyond, exp(20) is far above any use and far below what overflows
    weight = (F.logsigmoid(u) + attenuation * log_A).clamp(max=20).exp().detach()
    # weight and pull are constants here, so the gradient of this is the derivation's last line
    scaled = (weight * (others - pull * c / temperature)).mean()
    nt_xent = F.softplus(u).mean()
    # (x - x.detach()) is 0 and has x's gradient: NT-Xent's value with the scaled slope
    return nt_xent.detach() + (scaled - scaled.detach())


def margin_contrastive_loss(z1, z2, *, temperature=0.2, margin=0.2, **settings):
    """margin_loss of SimCLR's pairs, for a loop of your own: z1, z2 as in pair_terms."""
    c, others = pair_terms(z1, z2, temperature=temperature)
    return margin_loss(c, others, temperature=temperature, margin=margin, **settings)


# ---- 2. Views ------------------------------------------------------------------------------------
def sample_points(start, length, size):
    """Where along one side of the image to read a crop, one place for each new pixel.

    start, length: of the crop, (N, 1, 1) in pixels; size: of the side, in pixels. Returns
    (N, 1, size) in grid_sample's unit, in which -1 and 1 are the two edges of the image.
    """
    # The crop in `size` equal parts, and the pixel of the crop at the centre of each, the first one
    # being 0. (Pixel i lies from i to i + 1, its centre at i + 1/2: hence - 0.5, and + 1 below.)
    place = (torch.arange(size, device=start.device) + 0.5) / size * length - 0.5
    # Nothing outside of the crop is read; nor outside of the image, so that grid_sample needs no
    # padding_mode="border", which Apple's GPUs do not have (PyTorch issue 125098).
    place = torch.minimum(place.clamp(min=0), length - 1)
    return (2 * (start + place) + 1) / size - 1  # edges 0 and size become -1 and 1


def crop_and_flip(images, *, top, left, height, width, flip):
    """Each image's own box, resized to the image, and mirrored where flip is True.

    images: (N, 3, H, W) float; the box, (N, 1, 1) each, in pixels; flip: (N, 1, 1) bool.
    """
    x = sample_points(left, width, images.shape[3])
    y = sample_points(top, height, images.shape[2])
    x = torch.where(flip, x.flip(2), x)
    # every row of a box reads the same x, every column the same y: to broadcast them takes a tenth
    # of the time of affine_grid, which multiplies a matrix for each pixel
    x, y = torch.broadcast_tensors(x, y.transpose(1, 2))  # (N, H, W) each
    grid = torch.stack([x, y], dim=3)
    # contiguous: Apple's GPUs read a caller's channels-last images wrongly (PyTorch issue 174339)
    return F.grid_sample(images.contiguous(), grid, align_corners=False)


def grey(rgb):
    """(N, 3, ...) -> (N, 1, ...), with the weights that torchvision gives red, green and blue."""
    return 0.2989 * rgb[:, 0:1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:3]


def jitter_colors(images, *, brightness, contrast, saturation, hue, to_grey):
    """Change each image's colours, by one 3x3 matrix and one offset an image.

    images: (N, 3, H, W) in [0, 1]. brightness, contrast, saturation: (N, 1, 1) factors, 1 for no
    change; hue: (N, 1, 1) in turns; to_grey: (N, 1, 1) bool. As in torchvision, but always in this
    order, clamped to [0, 1] only at the end, and with hue as a rotation of the RGB cube.
    """
    identity = torch.eye(3, device=images.device)
    # Rodrigues' rotation about the grey axis k = (1, 1, 1) / 3**0.5: cos I + sin K + (1 - cos) k k'
    # where K v is the cross product k x v
    angle = 2 * math.pi * hue
    K = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=images.device) / 3**0.5
    hue_rotation = angle.cos() * identity + angle.sin() * K + (1 - angle.cos()) / 3

    # a pixel (red, green, blue) becomes colors @ pixel + offset; colors: (N, 3, 3). Its rows make
    # the new red, green and blue, so grey(colors) @ pixel is the new pixel's grey
    colors = brightness * contrast * identity
    # contrast moves colours away from the image's mean grey. This offset is a grey itself, and so
    # saturation, hue and to_grey leave it as it is
    offset = brightness * (1 - contrast) * grey(images.mean((2, 3)))[:, :, None]
    colors = saturation * colors + (1 - saturation) * grey(colors)
    colors = hue_rotation @ colors
    colors = torch.where(to_grey, grey(colors), colors)
    # all at once on the pixels, which is faster than step by step
    return torch.baddbmm(offset, colors, images.flatten(2)).clamp(0, 1).view_as(images)


def augment(images, *, crop_min=0.2, color_strength=0.5, gray_prob=0.1, flip=True):
    """A random view of each image, as in SimCLR; the whole batch at once, on its device.

    images: (N, 3, H, W) float in [0, 1]. A crop has crop_min to 1 of the area and an aspect ratio
    of 3/4 to 4/3, before a side longer than the image's is cut (torchvision draws again); half of
    the views are mirrored if flip, 80% change colour, and a share of gray_prob turns grey. The
    defaults suit small photographs.
    """
    n, _, height, width = images.shape

    def uniform(low, high):  # one number for each image
        return torch.empty(n, 1, 1, device=images.device).uniform_(low, high)

    area = height * width * uniform(crop_min, 1)
    aspect = uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    crop_height = (area / aspect).sqrt().clamp(max=height)
    crop_width = (area * aspect).sqrt().clamp(max=width)
    views = crop_and_flip(
        images,
        top=uniform(0, 1) * (height - crop_height),
        left=uniform(0, 1) * (width - crop_width),
        height=crop_height,
        width=crop_width,
        flip=uniform(0, 1) < (0.5 if flip else 0),
    )
    # SimCLR's jitter of strength s: 0.8 s for brightness, contrast, saturation; 0.2 s for hue
    strength = color_strength * (uniform(0, 1) < 0.8)
    return jitter_colors(
        views,
        brightness=1 + 0.8 * strength * uniform(-1, 1),
        contrast=1 + 0.8 * strength * uniform(-1, 1),
        saturation=1 + 0.8 * strength * uniform(-1, 1),
        hue=0.2 * strength * uniform(-1, 1),
        to_grey=uniform(0, 1) < gray_prob,
    )


# ---- 3. Encoder ----------------------------------------------------------------------------------
def small_encoder():
    """(N, 3, 32, 32) -> features (N, 192); small enough for a laptop's CPU."""
    return nn.Sequential(
        nn.Conv2d(3, 16, kernel_size=3, stride=2, padding=1, bias=False),  # BatchNorm has a bias
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),  # 16 channels, 16x16 places
        nn.Conv2d(16, 24, kernel_size=3, padding=1, bias=False),
        nn.MaxPool2d(2),  # before BatchNorm, which then has a quarter of the work
        nn.BatchNorm2d(24),
        nn.ReLU(inplace=True),  # 24 channels, 8x8 places
        nn.Conv2d(24, 48, kernel_size=3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(48),
        nn.ReLU(inplace=True),  # 48 channels, 4x4 places
        nn.MaxPool2d(2),
        nn.Flatten(),  # 48 channels, 2x2 places
    )


def resnet18_encoder():
    """(N, 3, 32, 32) -> features (N, 512); for small photographs a 3x3 stem and no max-pool."""
    from torchvision.models import resnet18

    encoder = resnet18(weights=None)
    encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    encoder.maxpool = nn.Identity()
    encoder.fc = nn.Identity()
    return encoder


ENCODERS = {"small": (small_encoder, 192), "resnet18": (resnet18_encoder, 512)}


class Model(nn.Module):
    """Images (N, 3, 32, 32) float in [0, 1] -> (h, z): features (N, F), which the probes use, and
    embeddings (N, 128), which the loss compares. encoder: a name of ENCODERS."""

    def __init__(self, encoder):
        super().__init__()
        make_encoder, features = ENCODERS[encoder]
        self.encoder = make_encoder()
        # nn.Linear as it comes: before BatchNorm its bias is idle, and does no harm
        self.projector = nn.Sequential(
            nn.Linear(features, 2 * features),
            nn.BatchNorm1d(2 * features),
            nn.ReLU(inplace=True),
            nn.Linear(2 * features, 128),
            # centred: what ReLU leaves is positive, so all z would begin nearly parallel
            nn.BatchNorm1d(128, affine=False),
        )

    def forward(self, images):
        h = self.encoder(images)
        return h, self.projector(h)


# ---- 4. Training ---------------------------------------------------------------------------------
def learning_rate(progress, config):
    """The optimizer's rate when `progress`, 0 to 1, of the training is done.

    A tenth of the training linearly up to lr * batch_size / 256, then a cosine down to 0.
    """
    peak = config.lr * config.batch_size / 256
    if progress < 0.1:
        return peak * progress / 0.1
    return peak * (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2


@torch.no_grad()
def measure(c, others, config):
    """What to report of a batch, {name: tensor of the shape of c}; c, others as of pair_terms.

    loss: NT-Xent's. angle: theta in degrees. E, D, A: what the margin does or, where a switch is
    off, would do; log_E, log_D and log_A: their logarithms, as factors average geometrically.
    """
    tau = config.temperature
    u = others - c / tau
    E, D, log_A = gradient_factors(
        c, u, temperature=tau, margin=config.margin, subtractive_margin=config.subtractive_margin
    )
    return {
        "loss": F.softplus(u),
        "angle": c.clamp(-1, 1).acos().rad2deg(),  # rounding can take c out of its range
        "E": E,
        "D": D,
        "A": log_A.clamp(max=80).exp(),  # exp(89) is infinite in float32
        "log_E": E.log(),
        "log_D": D.log().clamp(min=-5),  # D can be 0; exp(-5) is as good as that
        "log_A": log_A,
    }


def has_bfloat16(device):
    """Whether to train in bfloat16: where a card computes in it; a T4 only emulates it, slowly."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def train_step(model, optimizer, images, config):
    """One step: two views of each image (N, 3, 32, 32) uint8, the loss and its gradient.

    model(views) is (features, embeddings). Returns what measure says of the 2N anchors.
    """
    device = images.device
    twice = images.repeat(2, 1, 1, 1) / 255
    views = augment(twice, crop_min=config.crop_min, gray_prob=config.gray_prob, flip=config.flip)
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
        _, z = model(views)
    z1, z2 = z.chunk(2)
    c, others = pair_terms(z1, z2, temperature=config.temperature)
    loss = margin_loss(c, others, **config.loss_settings())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return measure(c, others, config)


def train_epoch(model, optimizer, images, epoch, config):
    """One pass over images (N, 3, 32, 32) uint8, on their device, in batches of random order.

    epoch counts from 0. Returns measure's means over steps and anchors: a row of metrics.csv.
    FloatingPointError if the loss is not finite.
    """
    start = time.perf_counter()
    steps = len(images) // config.batch_size  # the images left over differ from epoch to epoch
    # a seed for each epoch, so that a run that is resumed repeats it; two values of config.seed
    # share none, as no run has a million epochs
    seed = config.seed * 1_000_003 + epoch
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches = order[: steps * config.batch_size].view(steps, config.batch_size).to(images.device)
    torch.manual_seed(seed * 1_009)  # for the views, another than for the order
    model.train()
    sums = {}
    for step, batch in enumerate(batches):
        progress = (epoch + (step + 0.5) / steps) / config.epochs  # in the middle of the step
        optimizer.param_groups[0]["lr"] = learning_rate(progress, config)
        measured = train_step(model, optimizer, images[batch], config)
        # sums stay on the device: to read a number here would make the CPU wait for the GPU
        for name, values in measured.items():
            sums[name] = sums.get(name, 0) + values.mean() / steps
    row = {name: total.item() for name, total in sums.items()}
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(f"loss {row['loss']} in epoch {epoch + 1}: lower --lr")
    rate = steps * config.batch_size / (time.perf_counter() - start)
    return {"epoch": epoch + 1, **row, "images_per_second": rate}


# ---- 5. Probes -----------------------------------------------------------------------------------
@torch.no_grad()
def extract_features(model, images):
    """Features (N, F) of images (N, 3, 32, 32) uint8. Puts the model in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model.encoder(batch.to(device) / 255) for batch in images.split(500)])


def check_labels(h, y):
    """ValueError unless there is one label for each row of features; (N, 1) would be broadcast."""
    if y.shape != h.shape[:1]:
        raise ValueError(f"labels {tuple(y.shape)} are not (N,) for features {tuple(h.shape)}")


def linear_probe(h_train, y_train, h_test, y_test):
    """Test accuracy in percent of penalised logistic regression on standardised features.

    h_train, h_test: (N, F) float; y_train, y_test: (N,) int64. ValueError for other labels' shapes.
    """
    check_labels(h_train, y_train)
    check_labels(h_test, y_test)
    mean = h_train.mean(0)
    std = h_train.std(0).clamp(min=1e-6)  # a feature may be 0 for all images
    x_train = (h_train - mean) / std
    x_test = (h_test - mean) / std
    classes = int(y_train.max()) + 1
    coefficients = x_train.new_zeros(x_train.shape[1], classes).requires_grad_()
    biases = x_train.new_zeros(classes).requires_grad_()
    # tolerance_change: by default a small step ends it, before the optimum
    limits = dict(max_iter=200, tolerance_grad=1e-5, tolerance_change=0, history_size=20)
    optimizer = torch.optim.LBFGS([coefficients, biases], line_search_fn="strong_wolfe", **limits)

    def closure():
        optimizer.zero_grad()
        cross_entropy = F.cross_entropy(x_train @ coefficients + biases, y_train)
        # without a penalty, separable classes have no finite optimum; this one is weak
        loss = cross_entropy + 0.005 * coefficients.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    guesses = (x_test @ coefficients + biases).argmax(1)
    return 100 * (guesses == y_test).float().mean().item()


def knn(h_train, y_train, h_test, y_test, *, k=10):
    """Test accuracy in percent when the k nearest training features, by cosine, vote.

    h_train, h_test: (N, F) float; y_train, y_test: (N,) int64. ValueError for other labels' shapes.
    """
    check_labels(h_train, y_train)
    check_labels(h_test, y_test)
    h_train = F.normalize(h_train)
    h_test = F.normalize(h_test)
    k = min(k, len(h_train))
    # one vote each, and 1/2, 1/4, 1/8, ... more, which is below one vote in all: breaks ties only
    votes = 1 + 0.5 ** torch.arange(1, k + 1).to(h_train)
    guesses = []
    for h in h_test.split(1000):  # 1,000 rows of cosines at a time, to fit in memory
        neighbours = y_train[(h @ h_train.T).topk(k).indices]
        tally = F.one_hot(neighbours) * votes[:, None]
        guesses.append(tally.sum(1).argmax(1))
    return 100 * (torch.cat(guesses) == y_test).float().mean().item()


# ---- 6. Data -------------------------------------------------------------------------------------
GLYPHS = {  # name: (characters, {split: (number of images, seed)})
    "glyphs": ("ABCDEFGHIJKLMNOPQRSTUVWXYZ", {"train": (5000, 0), "test": (2000, 1)}),
    "digits": ("0123456789", {"train": (2000, 2), "test": (2000, 3)}),
}
FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif
    DejaVuSerif-Bold DejaVuSerif-Italic STIXGeneral STIXGeneralBol STIXGeneralItalic
    cmr10 cmb10 cmss10 cmtt10 STIXGeneralBolIta""".split()  # in every matplotlib since 3.6
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "svhn": "SVHN"}
TORCHVISION["fashion-mnist"] = "FashionMNIST"


def draw_stencils(characters):
    """Each character in each font, white on black: (fonts, characters, 1, 48, 48) in [0, 1]."""
    stencils = torch.zeros(len(FONTS), len(characters), 1, 48, 48)
    for i, name in enumerate(FONTS):
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", 32)
        for j, character in enumerate(characters):
            drawing = Image.new("L", (48, 48))
            ImageDraw.Draw(drawing).text((24, 24), character, fill=255, font=font, anchor="mm")
            stencils[i, j, 0] = torch.from_numpy(np.array(drawing)) / 255
    return stencils


def glyphs(characters, count, seed):
    """Characters in random fonts, sizes, angles, places, colours and noise.

    Returns images (count, 3, 32, 32) uint8 and labels (count,) int64.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    labels = torch.arange(count) % len(characters)
    font = torch.randint(len(FONTS), (count,), generator=generator)
    stencils = draw_stencils(characters)[font, labels]
    # the share of the stencil's side that the image shows: 32 of 48 pixels leave a character the
    # size of 32 with which it was drawn, more pixels make it smaller
    zoom = 32 / 48 * 32 / uniform(22, 32, 1, 1)
    angle = uniform(-15, 15).deg2rad()
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    shift = uniform(-0.12, 0.12, 2, 1)  # up to 3 of the stencil's pixels
    warp = torch.cat([zoom * rotation.view(-1, 2, 2), shift], 2)
    grid = F.affine_grid(warp, (count, 1, 32, 32), align_corners=False)
    ink = F.grid_sample(stencils, grid, align_corners=False)
    paper = uniform(0, 1, 3, 1, 1)
    # at least 0.35 from paper in every channel, also where modulo 1 wraps around
    color = (paper + uniform(0.35, 0.65, 3, 1, 1)) % 1
    noise = 0.03 * torch.randn(count, 3, 32, 32, generator=generator)
    images = (paper + ink * (color - paper) + noise).clamp(0, 1)
    return (images * 255).round().to(torch.uint8), labels


def read_picture(path):
    """A file as an upright RGB picture, laid on white where it is transparent."""
    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":  # 16 or 32 bits, which convert would cut at 255
                raise ValueError("it has more than 8 bits a channel")
            picture = ImageOps.exif_transpose(picture).convert("RGBA")
    # SyntaxError and ValueError are Pillow's for some broken files; none of these names the file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {error}")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


# the runs of a process share the tensors: do not write into them
@functools.cache
def load_images(name, split, data_dir="data", max_images=0):
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64; max_images of them, 0 for all.

    folder:DIR is read from DIR/train/CLASS and DIR/test/CLASS, once in a process: after it has
    changed, call load_images.cache_clear().
    """
    if name in GLYPHS:
        characters, splits = GLYPHS[name]
        images, labels = glyphs(characters, *splits[split])
        return images[: max_images or None], labels[: max_images or None]
    from torchvision import datasets

    if name.startswith("folder:"):
        folder = Path(name.removeprefix("folder:")).expanduser()
        train = datasets.ImageFolder(folder / "train", loader=read_picture)
        test = datasets.ImageFolder(folder / "test", loader=read_picture)
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(f"{folder}: train and test do not share the classes {odd}")
        dataset = train if split == "train" else test
    elif name in TORCHVISION:
        part = {"split": split} if name in ("svhn", "stl10") else {"train": split == "train"}
        try:
            dataset = getattr(datasets, TORCHVISION[name])(data_dir, download=True, **part)
        except (OSError, RuntimeError) as error:
            raise OSError(f"{name} could not be downloaded into {data_dir}: {error}")
    else:
        raise ValueError(f"no data set {name}: {[*GLYPHS, *TORCHVISION]}, folder:DIR")

    def read(i):
        picture, label = dataset[i]
        small = picture.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        return np.asarray(small), label

    # files lie class by class: at random, so that a part of them has all classes
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor() as pool:  # threads suffice: Pillow decodes outside of Python's lock
        pictures, labels = zip(*pool.map(read, order[: max_images or None].tolist()))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(labels)


# ---- 7. Settings ---------------------------------------------------------------------------------
LOSS_SETTINGS = tuple(RANGES)  # which up to here has margin_loss's; now come the others
RANGES |= {
    "max_images": (0, 1e9),
    "crop_min": (0.01, 1),  # of 1,024 pixels 10 are left
    "gray_prob": (0, 1),
    "epochs": (1, 1e6),
    "batch_size": (2, 1e6),  # one image has no negatives
    "lr": (0, 1e38),  # not inf or nan; the loss shows when it is too large
    "seed": (0, 2**31 - 1),  # train_epoch's seeds fit in 64 bits
}


def setting(default, text, compare=True):
    """A line of Config: its default and its help. compare=False: may differ when a run goes on."""
    return field(default=default, metadata={"help": text}, compare=compare)


@dataclass(frozen=True)
class Config:
    """The settings of a run, each of them a flag. ValueError for one that is out of range."""

    dataset: str = setting("glyphs", "glyphs (letters), digits, cifar10, ... or folder:DIR")
    unseen: tuple = setting(("digits",), "another set to probe on; can be repeated")
    data_dir: str = setting("data", "folder for downloads", compare=False)
    max_images: int = setting(0, "images of each split, 0 for all")
    validation: bool = setting(False, "probe on a held-out fifth of the training images")

    crop_min: float = setting(0.5, "least share of the image's area in a crop")
    gray_prob: float = setting(0.2, "probability of a grey view")
    flip: bool = setting(False, "mirror half of the views")

    temperature: float = setting(0.2, "temperature of the softmax, tau")
    margin: float = setting(0.2, "angular margin in radians; 0 is NT-Xent, the baseline")
    subtractive_margin: float = setting(0.0, "margin that is taken off the positive's cosine")
    emphasis: float = setting(1.0, "strength, the exponent of E; 0 is off")
    deemphasis: float = setting(1.0, "strength, the exponent of D")
    attenuation: float = setting(1.0, "strength, the exponent of A")
    positive_scale: float = setting(1.0, "a constant on the pull of all positive pairs")

    encoder: str = setting("small", "small or resnet18")
    epochs: int = setting(8, "passes over the images")
    batch_size: int = setting(64, "images in a step")
    lr: float = setting(0.4, "peak learning rate for a batch of 256, in proportion for others")
    seed: int = setting(0, "of weights, batches and views")
    device: str = setting(
        "cuda" if torch.cuda.is_available() else "cpu", "cuda, cpu or mps", compare=False
    )
    out: str = setting("runs", "folder for the folders of runs", compare=False)

    def __post_init__(self):
        if isinstance(self.unseen, str):
            object.__setattr__(self, "unseen", (self.unseen,))
        # each becomes of its default's type: numpy's numbers, lists and paths could not be stored
        for knob in fields(self):
            value = getattr(self, knob.name)
            plain = type(knob.default)(value)
            if plain != value and isinstance(plain, int | float):  # a bool is an int
                raise ValueError(f"{knob.name} must be {type(plain).__name__}, not {value!r}")
            object.__setattr__(self, knob.name, plain)
        check_range(**{name: getattr(self, name) for name in RANGES})
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {[*ENCODERS]}, not {self.encoder}")
        sets = (self.dataset, *self.unseen)
        if len(set(sets)) < len(sets):
            raise ValueError(f"a data set stands twice: {sets}")

    def loss_settings(self):
        """What margin_loss takes."""
        return {name: getattr(self, name) for name in LOSS_SETTINGS}

    def name(self):
        """How a run's folder begins; of a long path only the end."""
        return file_name(
            f"{self.dataset[-40:]}-batch{self.batch_size}-tau{self.temperature:g}"
            f"-margin{self.margin:g}-E{self.emphasis:g}D{self.deemphasis:g}A{self.attenuation:g}"
            f"-seed{self.seed}"
        )


def file_name(text):
    """text, with _ for all that a file's name may not have on some system."""
    return re.sub("[^A-Za-z0-9._+-]", "_", text)


def preset(dataset, encoder=None):
    """What belongs to a data set and an encoder: Config(**preset("cifar10") | {"epochs": 5}).

    Without an encoder: resnet18 for photographs where CUDA is (a CPU is too slow), else small.
    """
    values = {"dataset": dataset, "encoder": encoder or "small"}
    if dataset not in GLYPHS:
        values |= {"unseen": (), "crop_min": 0.2, "gray_prob": 0.1, "batch_size": 128, "epochs": 20}
        values["flip"] = dataset != "svhn"  # a house number reads otherwise in a mirror
        if encoder is None and torch.cuda.is_available():
            values["encoder"] = "resnet18"
    if values["encoder"] == "resnet18":  # not tuned
        values |= {"temperature": 0.5, "batch_size": 512, "lr": 0.06, "epochs": 100}
    return values


def load_data(config):
    """Images to train on, and {name: (train, test)} to probe on, the seen set first."""
    sets = {}
    for name in (config.dataset, *config.unseen):
        train = load_images(name, "train", config.data_dir, config.max_images)
        if not config.validation:
            test = load_images(name, "test", config.data_dir, config.max_images)
        elif len(train[1]) < 5:
            raise ValueError(f"{name}: {len(train[1])} images have no fifth for validation")
        else:
            test = [tensor[: len(tensor) // 5] for tensor in train]
            train = [tensor[len(tensor) // 5 :] for tensor in train]
        sets[name] = (train, test)
    images, _ = sets[config.dataset][0]
    if config.batch_size > len(images):
        raise ValueError(f"batch_size {config.batch_size} is more than {len(images)} images")
    return images, sets


# ---- 8. Runs -------------------------------------------------------------------------------------
def new_folder(config):
    """A folder in config.out for this run alone."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = Path(config.out, f"{config.name()}-{number}")
        try:
            folder.mkdir()  # fails if it exists: of two runs that start together each has its own
            return folder
        except FileExistsError:
            pass


def build(config):
    """The untrained model of a seed on its device, and its optimizer; train_epoch sets the rate."""
    torch.manual_seed(config.seed)
    model = Model(config.encoder).to(config.device)
    # channels last is faster, but wrong on Apple's GPUs (PyTorch issue 175189)
    if not config.device.startswith("mps"):
        model = model.to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True  # all batches have one size: it pays to try kernels
    return model, torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)


def write_csv(path, rows):
    """rows: dicts with the same keys."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def save_checkpoint(folder, config, model, optimizer, history):
    """What it takes to go on, without random states, as train_epoch seeds them; and metrics.csv."""
    state = {"config": vars(config), "history": history}
    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    # renamed when it is whole: a full disk or Ctrl-C leaves the earlier one
    torch.save(state, folder / "partial.pt")
    (folder / "partial.pt").replace(folder / "checkpoint.pt")
    write_csv(folder / "metrics.csv", history)


def load_checkpoint(folder):
    """What save_checkpoint left, with its Config. Executes nothing that a file may hold."""
    state = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
    return state | {"config": Config(**state["config"])}


def load_model(folder):
    """The trained Model of a run's folder, in eval mode."""
    state = load_checkpoint(folder)
    model = Model(state["config"].encoder).eval()
    model.load_state_dict(state["model"])
    return model


def draw_curves(history, title):
    """A Figure of loss, angle and factors over the epochs; history: rows of metrics.csv."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    figure.suptitle(title)
    colors = {"log_E": "#D55E00", "log_D": "#0072B2", "log_A": "#009E73"}  # told apart by all eyes
    panels = {
        "NT-Xent": ["loss"],
        "angle of pairs (degrees)": ["angle"],
        "mean of the log factor": ["log_E", "log_D", "log_A"],
    }
    epochs = [row["epoch"] for row in history]
    for axes, label in zip(figure.subplots(1, 3), panels):
        for name in panels[label]:
            color = colors.get(name, "black")
            axes.plot(epochs, [row[name] for row in history], "o-", color=color, label=name)
        axes.set(xlabel="epoch", ylabel=label)
    axes.legend()  # of the last panel, which has three curves
    return figure


def probe(model, train, test):
    """(linear probe, kNN): test accuracies in percent of the frozen encoder.

    train, test: images (N, 3, 32, 32) uint8 and labels (N,) int64. FloatingPointError if the
    features are not finite.
    """
    h_train = extract_features(model, train[0])
    h_test = extract_features(model, test[0])
    if not (h_train.isfinite().all() and h_test.isfinite().all()):
        raise FloatingPointError("the features are not finite: lower --lr")
    data = (h_train, train[1].to(h_train.device), h_test, test[1].to(h_test.device))
    return linear_probe(*data), knn(*data)


MEANS = ["loss", "angle", "E", "D", "A", "log_E", "log_D", "log_A"]  # over epochs, in results.json


def write_results(folder, config, history, before, after):
    """curves.png and results.json, of which the content is returned.

    before, after training: {name of the data set: what probe gives}.
    """
    probes = []
    for name, (linear, neighbours) in after.items():
        row = {"dataset": name, "role": "seen" if name == config.dataset else "unseen"}
        row["random_linear"], row["random_knn"] = before.get(name, (None, None))
        probes.append(row | {"linear": linear, "knn": neighbours})
    results = {
        "config": vars(config),
        "probes": probes,
        "means": {name: sum(row[name] for row in history) / len(history) for name in MEANS},
        "folder": str(folder),
        "versions": {"torch": torch.__version__, "matplotlib": matplotlib.__version__},
    }
    draw_curves(history, folder.name).savefig(folder / "curves.png", dpi=150)
    # renamed when it is whole, as a run has finished where it is
    (folder / "partial.json").write_text(json.dumps(results, indent=2))
    (folder / "partial.json").replace(folder / "results.json")
    return results


EPOCH_LINE = (
    "epoch {epoch}  NT-Xent {loss:.3f}  angle {angle:.1f} deg  E {E:.3f}  D {D:.3f}  A {A:.3f}  "
    "{images_per_second:,.0f} images/s"
)
PROBE_LINE = (
    "{dataset} ({role}): linear probe {linear:.1f}% (untrained {random_linear:.1f}%), "
    "kNN {knn:.1f}% ({random_knn:.1f}%)"
)


def run(config, on_epoch=None, *, folder=None, untrained=True, verbose=True):
    """Train and probe once. Returns what results.json holds.

    on_epoch(row, model) gets each epoch's row of metrics.csv. folder: where to begin or to go on,
    else a new one. untrained: probe the encoder before its first step as well, and print both.
    verbose: print.
    """
    say = print if verbose else lambda text: None
    earlier = None
    if folder and Path(folder, "checkpoint.pt").exists():
        earlier = load_checkpoint(folder)
        if earlier["config"] != config:
            raise ValueError(f"{folder} holds a run with other settings")
        if Path(folder, "results.json").exists():
            say(f"{folder} has finished: see its results.json")
            results = json.loads(Path(folder, "results.json").read_text())
            return results | {"folder": str(folder)}  # it may have been moved
    images, sets = load_data(config)
    model, optimizer = build(config)
    folder = Path(folder or new_folder(config))
    folder.mkdir(parents=True, exist_ok=True)
    _, labels = sets[config.dataset][0]
    what = f"{len(images):,} images of {len(labels.unique())} classes"
    say(f"{folder}: {what}, {config.encoder} encoder, {config.device}")
    before = {}
    if untrained:
        before = {name: probe(model, *data) for name, data in sets.items()}
    history = []
    if earlier:
        model.load_state_dict(earlier["model"])
        optimizer.load_state_dict(earlier["optimizer"])
        history = earlier["history"]
    images = images.to(config.device)
    for epoch in range(len(history), config.epochs):
        row = train_epoch(model, optimizer, images, epoch, config)
        history.append(row)
        save_checkpoint(folder, config, model, optimizer, history)
        say(EPOCH_LINE.format(**row))
        if on_epoch:
            on_epoch(row, model)
    after = {name: probe(model, *data) for name, data in sets.items()}
    results = write_results(folder, config, history, before, after)
    if untrained:
        say("\n".join(PROBE_LINE.format(**row) for row in results["probes"]))
    return results


# ---- 9. Ablation ---------------------------------------------------------------------------------
OFF = {"emphasis": 0.0, "deemphasis": 0.0, "attenuation": 0.0, "positive_scale": 1.0}  # NT-Xent
ON = {"emphasis": 1.0, "deemphasis": 1.0, "attenuation": 1.0, "positive_scale": 1.0}  # the margin
SWITCHES = {
    "NT-Xent": OFF,
    "E": OFF | {"emphasis": 1.0},
    "D": OFF | {"deemphasis": 1.0},
    "A": OFF | {"attenuation": 1.0},
    "E+D": ON | {"attenuation": 0.0},
    "E+A": ON | {"deemphasis": 0.0},
    "D+A": ON | {"emphasis": 0.0},
    "E+D+A": ON,
}
# what --ablate runs: the switches, and a smaller pull that knows no angle
ABLATION = SWITCHES | {"pull x 0.5": OFF | {"positive_scale": 0.5}}
ACCURACIES = ["seen_linear", "seen_knn", "unseen_linear", "unseen_knn"]


def ablation_run(job):
    """(name, Config, folder) -> a row of ablate, which is nan where the run diverged."""
    name, config, folder = job
    torch.set_num_threads(1)  # on a CPU there are as many workers as cores
    row = {"setting": name, "seed": config.seed} | dict.fromkeys(ACCURACIES + MEANS, math.nan)
    try:
        results = run(config, folder=folder, untrained=False, verbose=False)
    except FloatingPointError:
        return row
    for column in ACCURACIES:
        role, kind = column.split("_")
        values = [probed[kind] for probed in results["probes"] if probed["role"] == role]
        row[column] = sum(values) / len(values) if values else math.nan  # no unseen set
    return row | results["means"]


def ablate(settings, seeds, config, folder, say=print):
    """Train with all settings, {name: overrides of config}, and seeds; a seed's runs share weights,
    batches and views. Goes on where it stopped.

    Returns a dict for each run, seed by seed, as in folder/runs.csv; nan where it diverged.
    ValueError if two names make one folder. A script that calls this needs
    `if __name__ == "__main__":`, as each worker imports it.
    """
    jobs = {}
    for seed, name in itertools.product(seeds, settings):
        run_folder = Path(folder, file_name(f"{name}-seed{seed}"))
        if run_folder in jobs:
            raise ValueError(f"two of these would share a folder: {[*settings]}")
        jobs[run_folder] = (name, replace(config, **settings[name], seed=seed), run_folder)
    load_data(config)  # so that the workers do not download side by side
    finished = [path for path in jobs if (path / "results.json").exists()]
    say(f"{len(jobs)} runs in {folder}, {len(finished)} finished")
    rows = []
    with ProcessPoolExecutor(
        torch.get_num_threads() if config.device == "cpu" else 1,
        multiprocessing.get_context("spawn"),  # a fork may hang after CUDA or threads
        # Ctrl-C reaches all processes: the workers ignore it, and this one ends them
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        try:
            # not pool.map: an error in it cancels all that wait, and then the pool's own thread
            # fails in Python 3.11 where the workers are terminated
            for future in [pool.submit(ablation_run, job) for job in jobs.values()]:
                row = future.result()
                rows.append(row)
                say(f"{len(rows)}/{len(jobs)}  {row['setting']}, seed {row['seed']}")
        except BrokenExecutor:
            raise RuntimeError(
                'a worker has ended: a script needs `if __name__ == "__main__":` around ablate, a '
                "notebook imports this file instead of pasting it; or else memory has run out"
            )
        except BaseException:  # Ctrl-C, or a run's error: end the workers at once
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    write_csv(Path(folder, "runs.csv"), rows)
    return rows


def matrix(rows, column):
    """A column of ablate's rows as a tensor (seeds, settings)."""
    settings = len({row["setting"] for row in rows})
    return torch.tensor([row[column] for row in rows]).view(-1, settings)


def print_table(rows):
    """Print ablate's linear probes in percent, with differences to line 1 paired by seed.

    failed: against the mean of line 1. log E, D, A: what the margin does, or would do where off.
    """
    print("setting          seen    difference  unseen    difference  failed  log E  log D  log A")
    seen = matrix(rows, "seen_linear")
    failed = seen.isnan() | (seen <= seen[:, 0].nanmean() - 10)
    for i, row in enumerate(rows[: seen.shape[1]]):  # the first seed's
        line = f"{row['setting']:15}"
        for values in (seen, matrix(rows, "unseen_linear")):
            gain = values[:, i] - values[:, 0]
            error = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else math.nan
            line += f"{values[:, i].mean():6.1f} {gain.mean():+7.1f} +- {error:3.1f}"
        logs = [matrix(rows, name)[:, i].mean() for name in ("log_E", "log_D", "log_A")]
        print(line + "{:8}{:7.3f}{:7.3f}{:7.3f}".format(failed[:, i].sum(), *logs))
    print(f"{len(seen)} seeds, +- standard error; failed: diverged, or 10 points below line 1")


def draw_ablation(rows):
    """A Figure of print_table's differences: a dot for a seed, a bar for the mean."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, role in zip(figure.subplots(1, 2, sharey=True), ("seen", "unseen")):
        values = matrix(rows, f"{role}_linear")
        for row, gain in zip(rows, (values - values[:, :1]).T):  # the first seed's rows
            axes.plot(gain, [row["setting"]] * len(gain), "ko", alpha=0.4)
            axes.plot(gain.mean(), row["setting"], "k|", markersize=18)
        axes.axvline(0, color="grey")
        axes.set(xlabel=f"linear probe, {role}: points above {rows[0]['setting']}")
    axes.invert_yaxis()  # the first setting on top; both panels share the axis
    return figure


# ---- 10. Command line ----------------------------------------------------------------------------
USER_ERRORS = (ValueError, ArithmeticError, RuntimeError, OSError, ImportError)
USER_ERRORS += (AssertionError, pickle.PickleError)  # a PyTorch without CUDA, a foreign checkpoint


def main(argv=None):
    """The command line. An error is told by its first line, with exit status 2."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--help] [FLAGS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # a preset fills in what is not given
    )
    kinds = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"action": "append"}}
    for knob in fields(Config):
        flag = "--" + knob.name.replace("_", "-")
        kind = kinds.get(type(knob.default), {"type": type(knob.default)})
        parser.add_argument(flag, help=f"{knob.metadata['help']} (letters: {knob.default})", **kind)
    for name in ("emphasis", "deemphasis", "attenuation"):
        parser.add_argument(f"--no-{name}", dest=name, action="store_const", const=0.0)
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--ablate", action="store_true", default=False, help="all switches, and a weaker pull"
    )
    way.add_argument("--resume", metavar="FOLDER", default=None, help="go on with a stopped run")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of --ablate (3)")
    flags = vars(parser.parse_args(argv))
    given = {knob.name: flags[knob.name] for knob in fields(Config) if knob.name in flags}
    try:
        if flags["resume"]:
            config = replace(load_checkpoint(flags["resume"])["config"], **given)
        else:
            config = Config(**preset(given.get("dataset", "glyphs"), given.get("encoder")) | given)
        if flags["ablate"]:
            folder = Path(config.out, f"ablation-{config.name()}")
            seeds = range(config.seed, config.seed + flags["seeds"])
            rows = ablate(ABLATION, seeds, config, folder)
            draw_ablation(rows).savefig(folder / "figure.png", dpi=150)
            print_table(rows)
        else:
            run(config, folder=flags["resume"])
    except USER_ERRORS as error:
        line, _, _ = str(error).partition("\n")  # PyTorch's can have many
        parser.exit(2, f"{parser.prog}: {line}\n")
    except KeyboardInterrupt:  # 130: as the shell counts it
        parser.exit(130, "\nstopped. The same --ablate goes on, a run with --resume FOLDER\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, workers, too
    # each line at once, also into a file; what a console cannot show is escaped, and ends no run
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    main()
