"""Margins in contrastive learning: what a margin does to the gradient, one effect at a time.

A contrastive loss pulls the two views of an image together (the positive pair) and pushes all
others apart. A margin makes the positive look worse than it is, by an angle m or a cosine m2.
Rho et al. (arXiv:2306.11526, abstract of v1) found three effects on the gradient. In this
project's reading they are exact factors, each with a switch:

    E  emphasis, >= 1     pulls the positive harder while its angle is small  --no-emphasis
    D  de-emphasis, <= 1  pulls it more softly at wide angles                 --no-deemphasis
    A  attenuation, >= 1  lets a nearly right anchor's gradient fade less     --no-attenuation
All on: the gradient of the margin loss. All off: that of NT-Xent, SimCLR's loss.

    python margin_contrastive.py --margin 0.2 --no-attenuation   train on letters, probe
    python margin_contrastive.py --ablate                        all switches, two controls
    torchrun --nproc_per_node=2 margin_contrastive.py            two processes
"""
import argparse
import csv
import difflib
import functools
import inspect
import itertools
import json
import math
import multiprocessing.pool
import os
import re
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # or gloo's threads outlive it
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import nn

# ---- 1. Loss
def pair_terms(z1, z2, *, temperature):
    """(c, others), (2N,): each anchor's cosine with its positive, and the logsumexp of its 2N - 2
    negatives' cosines / temperature. z1, z2: (N, dim) embeddings of two views, N >= 2, normalised
    here. float32, or float64 as z1 (not TF32). ValueError for other shapes."""
    if z1.shape != z2.shape or z1.ndim != 2 or len(z1) < 2:
        raise ValueError(f"not (N, dim), N >= 2: {tuple(z1.shape)}, {tuple(z2.shape)}")
    with torch.autocast(z1.device.type, enabled=False):  # exp(cosine / temperature) wants float32
        n, z = len(z1), torch.cat([z1, z2])
        z = z if z.dtype == torch.float64 else z.float()
        length = z.norm(dim=1, keepdim=True)
        z = z / length.masked_fill(length < 1e-12, torch.inf)
        c = (z[:n] * z[n:]).sum(1).repeat(2)
        same_image = torch.eye(n, dtype=torch.bool, device=z.device).repeat(2, 2)
        logits = ((z / temperature) @ z.T).masked_fill_(same_image, -torch.inf)
        return c, logits.logsumexp(1)

@torch.no_grad()
def log_gradient_factors(c, u, *, temperature, margin, subtractive_margin=0.0):
    """(log_E, log_D, log_A) of a margin m in radians, for c = cos(theta) of the positive and
    u = others - c / temperature, of any one shape. E acts below theta = (pi - m) / 2, D above; past
    pi - m, where D is 0, log_D is -40."""
    sin = ((1 - c) * (1 + c)).clamp(min=torch.finfo(c.dtype).eps).sqrt()
    g = math.cos(margin) + math.sin(margin) * c / sin  # d cos(theta + m) / d cos(theta)
    moved = torch.where(g > 0, c * math.cos(margin) - sin * math.sin(margin), -1.0)
    delta = (c - moved + subtractive_margin) / temperature  # u becomes u + delta
    log_E = g.clamp(min=1).log()
    log_D = g.clamp(min=math.exp(-40), max=1).log()
    log_A = F.logsigmoid(u + delta) - F.logsigmoid(u)  # sigmoid(u + delta) / sigmoid(u)
    return log_E, log_D, log_A

def margin_loss(c, others, *, temperature=0.2, margin=0.2, subtractive_margin=0.0, emphasis=1.0,
                deemphasis=1.0, attenuation=1.0, positive_scale=1.0, return_factors=False):
    """NT-Xent whose gradient is scaled as a margin scales it, each of the three effects apart.
    c, others: any one shape, from pair_terms, a queue (MoCo) or another modality (CLIP). margin is
    in radians (ArcFace's), subtractive_margin in cosine (CosFace's); emphasis, deemphasis and
    attenuation are strengths, exponents of E, D, A: 1 as in the margin, 0 off. ValueError if out of
    range. The *value* is NT-Xent's: the margin is in the (first) gradient. return_factors:
    (loss, c, log_E, log_D, log_A), all but the loss detached."""
    for name, value, low, high in (
            ("temperature", temperature, 1e-6, 1e6), ("margin (in radians)", margin, 0, math.pi),
            ("subtractive_margin", subtractive_margin, 0, 1e6), ("emphasis", emphasis, -1e6, 1e6),
            ("deemphasis", deemphasis, -1e6, 1e6), ("attenuation", attenuation, -1e6, 1e6),
            ("positive_scale", positive_scale, 1e-6, 1e6)):
        if not low <= value < high:
            raise ValueError(f"{name} must be in [{low:g}, {high:g}), not {value!r}")
    with torch.autocast(c.device.type, enabled=False):
        u = others - c / temperature
        nt_xent = -F.logsigmoid(-u).mean()  # softplus(u) = -log p, where p is the softmax's
        log_E, log_D, log_A = log_gradient_factors(
            c, u, temperature=temperature, margin=margin, subtractive_margin=subtractive_margin)
        # NT-Xent has sigmoid(u) * (d others - dc / temperature); A scales sigmoid(u), E and D dc
        pull = positive_scale * (emphasis * log_E + deemphasis * log_D).clamp(-40, 40).exp()
        weight = (F.logsigmoid(u) + attenuation * log_A).clamp(max=20).exp().detach()
        scaled = (weight * (others - pull * c / temperature)).mean()
        loss = nt_xent.detach() + (scaled - scaled.detach())  # value nt_xent, slope scaled
    return (loss, c.detach(), log_E, log_D, log_A) if return_factors else loss

def margin_contrastive_loss(z1, z2, *, temperature=0.2, margin=0.2, **settings):
    """margin_loss of SimCLR's pairs, z1 and z2 as in pair_terms."""
    c, others = pair_terms(z1, z2, temperature=temperature)
    return margin_loss(c, others, temperature=temperature, margin=margin, **settings)

def textbook_margin_loss(z1, z2, *, temperature, margin, subtractive_margin=0.0):
    """The ordinary way, for comparison: the margin in the positive's logit, and autograd."""
    n, z = len(z1), F.normalize(torch.cat([z1, z2]))
    partner = z.roll(n, 0)
    # not arccos, which loses its digits near 0 and pi
    theta = 2 * torch.atan2((z - partner).norm(dim=1), (z + partner).norm(dim=1))
    positive = torch.cos((theta + margin).clamp(max=math.pi)) - subtractive_margin
    target = torch.arange(2 * n, device=z.device).roll(n)
    cosines = (z @ z.T).fill_diagonal_(-torch.inf).scatter(1, target[:, None], positive[:, None])
    return F.cross_entropy(cosines / temperature, target)

# ---- 2. Augmentation
def crop_and_flip(images, top, left, height, width, flip):
    """Each image's box, in pixels, resized to the image and mirrored where flip, as torchvision
    does. images: (N, 3, H, W) float; the others: (N, 1, 1)."""
    grid = []
    for start, length, size in (left, width, images.shape[3]), (top, height, images.shape[2]):
        pixel = (torch.arange(size, device=images.device) + 0.5) / size * length - 0.5
        pixel = torch.minimum(pixel.clamp(min=0), length - 1)  # no padding is needed
        grid.append((2 * (start + pixel) + 1) / size - 1)
    x, y = grid
    x = torch.where(flip, x.flip(2), x)
    points = torch.stack(torch.broadcast_tensors(x, y.transpose(1, 2)), dim=3)
    return F.grid_sample(images, points, align_corners=False)

def grey(rgb):
    """(N, 3, ...) -> (N, 1, ...), luma as torchvision has it."""
    return 0.2989 * rgb[:, 0:1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:3]

def jitter_colors(images, brightness, contrast, saturation, hue, to_grey):
    """Each image's colours changed by (N, 1, 1) factors, turns of hue, a bool. Unlike torchvision
    in this order, clamped once, and hue turns the RGB cube about its grey axis."""
    identity, angle = torch.eye(3, device=images.device), 2 * math.pi * hue
    third = identity.roll(1, 0)
    turn = angle.cos() * identity + angle.sin() / 3**0.5 * (third - third.T) + (1 - angle.cos()) / 3
    colors = brightness * contrast * identity
    offset = brightness * (1 - contrast) * grey(images.mean((2, 3)))[:, :, None]
    colors = saturation * colors + (1 - saturation) * grey(colors)
    colors = turn @ colors
    colors = torch.where(to_grey, grey(colors), colors)
    return torch.baddbmm(offset, colors, images.flatten(2)).clamp(0, 1).view_as(images)

def augment(images, *, crop_min=0.2, color_strength=0.5, gray_prob=0.1, flip=True):
    """SimCLR's random view of each image, (N, 3, H, W) float in [0, 1], the whole batch at once.
    A crop of crop_min to 1 of the area, aspect ratio 3/4 to 4/3 (torchvision draws until it fits,
    here a side is cut); half are mirrored, 80% jittered."""
    n, _, height, width = images.shape
    def uniform(low, high):
        return torch.empty(n, 1, 1, device=images.device).uniform_(low, high)
    area = height * width * uniform(crop_min, 1)
    aspect = uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    h = (area / aspect).sqrt().clamp(max=height)
    w = (area * aspect).sqrt().clamp(max=width)
    top, left = uniform(0, 1) * (height - h), uniform(0, 1) * (width - w)
    views = crop_and_flip(images, top, left, h, w, (uniform(0, 1) < 0.5) & flip)
    strength = color_strength * (uniform(0, 1) < 0.8)
    brightness = 1 + 0.8 * strength * uniform(-1, 1)
    contrast = 1 + 0.8 * strength * uniform(-1, 1)
    saturation = 1 + 0.8 * strength * uniform(-1, 1)
    hue = 0.2 * strength * uniform(-1, 1)
    return jitter_colors(views, brightness, contrast, saturation, hue, uniform(0, 1) < gray_prob)

# ---- 3. Data
GLYPHS = {  # name: (characters, {split: (number of images, seed)})
    "glyphs": ("ABCDEFGHIJKLMNOPQRSTUVWXYZ", {"train": (5000, 0), "test": (2000, 1)}),
    "digits": ("0123456789", {"train": (2000, 2), "test": (2000, 3)})}
FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif
    DejaVuSerif-Bold DejaVuSerif-Italic STIXGeneral STIXGeneralBol STIXGeneralItalic
    cmr10 cmb10 cmss10 cmtt10 STIXGeneralBolIta""".split()  # they come with matplotlib
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "svhn": "SVHN",
               "fashion-mnist": "FashionMNIST"}

class UserError(Exception):
    """What a user can mend."""

def glyphs(characters, count, seed):
    """Characters in random fonts, sizes, angles, places, colours and noise: (count, 3, 32, 32)
    uint8, and labels (count,) int64."""
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    stencils = torch.zeros(len(FONTS), len(characters), 1, 48, 48)
    for i, name in enumerate(FONTS):
        try:
            font = ImageFont.truetype(str(fonts / f"{name}.ttf"), 32)
        except OSError as error:
            raise UserError(f"{fonts / name}.ttf, a font of matplotlib's: {error}")
        for j, character in enumerate(characters):
            drawing = Image.new("L", (48, 48))
            ImageDraw.Draw(drawing).text((24, 24), character, fill=255, font=font, anchor="mm")
            stencils[i, j, 0] = torch.from_numpy(np.array(drawing)) / 255
    generator = torch.Generator().manual_seed(seed)
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)
    labels = torch.arange(count) % len(characters)
    font = torch.randint(len(FONTS), (count,), generator=generator)
    zoom = 32 / 48 * 32 / uniform(22, 32, 1, 1)
    angle = uniform(-15, 15).deg2rad()
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    warp = torch.cat([zoom * rotation, uniform(-0.12, 0.12, 2, 1)], 2)
    grid = F.affine_grid(warp, (count, 1, 32, 32), align_corners=False)
    ink = F.grid_sample(stencils[font, labels], grid, align_corners=False)
    paper = uniform(0, 1, 3, 1, 1)
    color = (paper + uniform(0.35, 0.65, 3, 1, 1)) % 1
    noise = 0.03 * torch.randn(count, 3, 32, 32, generator=generator)
    images = (paper + ink * (color - paper) + noise).clamp(0, 1) * 255
    return images.round().to(torch.uint8), labels

def open_dataset(name, split, data_dir):
    """A torchvision set or folder:DIR, of which dataset[i] is (picture, label)."""
    import torchvision.datasets as sets
    if name in TORCHVISION:
        which = dict(split=split) if name in ("svhn", "stl10") else dict(train=split == "train")
        return getattr(sets, TORCHVISION[name])(data_dir, download=True, **which)
    kind, _, folder = name.partition(":")
    if kind != "folder":
        raise UserError(f"no data set {name}: {[*GLYPHS, *TORCHVISION]}, folder:DIR")
    if not Path(folder, "train").is_dir() or not Path(folder, "test").is_dir():
        raise UserError(f"{folder} must hold train/CLASS/*.jpg and test/CLASS/*.jpg")
    parts = {part: sets.ImageFolder(Path(folder, part)) for part in ("train", "test")}
    if parts["train"].classes != parts["test"].classes:
        raise UserError(f"{folder}: train and test have other classes")
    return parts[split]

@functools.cache
def load_images(name, split, data_dir="data", max_images=0):
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64, the first max_images (0: all)."""
    if name in GLYPHS:
        characters, splits = GLYPHS[name]
        images, labels = glyphs(characters, *splits[split])
        return images[:max_images or None], labels[:max_images or None]
    dataset = open_dataset(name, split, data_dir)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    def read(i):
        picture, label = dataset[i]
        picture = picture.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        return np.asarray(picture), label
    with multiprocessing.pool.ThreadPool() as pool:
        pictures, labels = zip(*pool.map(read, order[:max_images or None].tolist()))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(labels)

# ---- 4. Encoder
class Model(nn.Module):
    """(N, 3, 32, 32) float in [0, 1] -> features h (N, 192), of resnet18 (N, 512), and the
    projector's embeddings z (N, 128)."""
    def __init__(self, encoder):
        super().__init__()
        if encoder == "resnet18":  # for small photographs: a 3x3 stem, no max-pool
            from torchvision.models import resnet18
            self.encoder, features = resnet18(weights=None), 512
            self.encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            self.encoder.maxpool = self.encoder.fc = nn.Identity()
        else:
            layers, inputs, features = [], 3, 192
            for outputs, stride, pool in (16, 2, 1), (24, 1, 2), (48, 1, 2):
                layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                           nn.MaxPool2d(pool), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                inputs = outputs
            self.encoder = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten())  # 2x2 places
        # its BatchNorm spreads embeddings from the start
        self.projector = nn.Sequential(
            nn.Linear(features, 2 * features), nn.BatchNorm1d(2 * features), nn.ReLU(inplace=True),
            nn.Linear(2 * features, 128), nn.BatchNorm1d(128, affine=False))

    def forward(self, x):
        h = self.encoder(x)
        return h, self.projector(h)

# ---- 5. Probes
@torch.no_grad()
def extract_features(model, images):
    """Features (N, F) of images (N, 3, 32, 32) uint8; puts the model in eval mode."""
    device = next(model.eval().parameters()).device
    return torch.cat([model.encoder(batch.to(device) / 255) for batch in images.split(500)])

def linear_probe(h_train, y_train, h_test, y_test):
    """Test accuracy in percent of logistic regression on features standardised by h_train.
    h_*: (N, F) float, y_*: (N,) int64."""
    mean, std = h_train.mean(0), h_train.std(0).clamp(min=1e-6)
    x_train = F.pad((h_train - mean) / std, (0, 1), value=1.0)  # ones, for the biases
    x_test = F.pad((h_test - mean) / std, (0, 1), value=1.0)
    weights = x_train.new_zeros(x_train.shape[1], int(y_train.max()) + 1).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, max_eval=1000, history_size=20, tolerance_grad=1e-5,
        tolerance_change=0, line_search_fn="strong_wolfe")
    def closure():
        loss = F.cross_entropy(x_train @ weights, y_train) + 0.005 * weights[:-1].square().sum()
        weights.grad, = torch.autograd.grad(loss, weights)
        return loss
    optimizer.step(closure)
    return 100 * ((x_test @ weights).argmax(1) == y_test).float().mean().item()

def knn(h_train, y_train, h_test, y_test, *, k=10):
    """Test accuracy in percent of the majority of the k nearest training features by cosine.
    h_*: (N, F) float, y_*: (N,) int64."""
    h_train, h_test, k = F.normalize(h_train), F.normalize(h_test), min(k, len(h_train))
    vote = 1 + 0.5 ** torch.arange(1, k + 1).to(h_train)  # ties go to the nearest
    guesses = []
    for h in h_test.split(1000):
        neighbours = y_train[(h @ h_train.T).topk(k).indices]
        guesses.append((F.one_hot(neighbours) * vote[:, None]).sum(1).argmax(1))
    return 100 * (torch.cat(guesses) == y_test).float().mean().item()

def probe(model, train, test):
    """(linear, kNN) test accuracies in percent of the frozen encoder."""
    h_train, h_test = extract_features(model, train[0]), extract_features(model, test[0])
    data = h_train, train[1].to(h_train.device), h_test, test[1].to(h_test.device)
    return linear_probe(*data), knn(*data)

# ---- 6. Training
# by torchrun: which process, of how many
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

@dataclass(frozen=True)
class Config:
    """The settings of a run; comments are the flags' help. ValueError for an invalid one."""
    # data
    dataset: str = "glyphs"  # NAME: glyphs, cifar10, ... or folder:DIR
    unseen: tuple = ("digits",)  # NAME: another to probe on; repeatable
    data_dir: str = "data"  # DIR: where downloads go
    max_images: int = 0  # N: images a split, 0 for all
    validation: bool = False  # probe on a held-out fifth of train
    # views
    crop_min: float = 0.5  # SHARE: least share of the area in a crop
    gray_prob: float = 0.2  # P: probability of a grey view
    flip: bool = False  # mirror half of the views
    # loss
    margin: float = 0.2  # RADIANS: angular; 0 is NT-Xent, the baseline
    subtractive_margin: float = 0.0  # COSINE: off the positive's cosine
    temperature: float = 0.2  # TAU: temperature of the softmax
    emphasis: float = 1.0  # STRENGTH: exponent of E, 0 is off
    deemphasis: float = 1.0  # STRENGTH: exponent of D
    attenuation: float = 1.0  # STRENGTH: exponent of A
    positive_scale: float = 1.0  # S: constant on the positive's pull
    # training
    encoder: str = "small"  # NAME: small or resnet18
    epochs: int = 8  # N: passes over the images
    batch_size: int = 64  # N: images a step, over all processes
    lr: float = 0.4  # RATE: peak, for a batch of 256
    seed: int = 0  # N: of weights, batches and views
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # NAME: cuda, cpu or mps
    compile: bool = False  # torch.compile, faster after a slow start
    out: str = "runs"  # DIR: for runs

    def __post_init__(self):
        fine = dict(
            encoder=self.encoder in ("small", "resnet18"), crop_min=0.01 <= self.crop_min <= 1,
            epochs=self.epochs > 0, max_images=self.max_images >= 0,
            batch_size=self.batch_size > 1 and self.batch_size % WORLD == 0)
        for name in fine:
            if not fine[name]:
                raise ValueError(f"{name} cannot be {getattr(self, name)}")
        margin_loss(torch.zeros(2), torch.zeros(2), **self.arguments(margin_loss))

    def name(self):
        text = ("{dataset}-batch{batch_size}-tau{temperature:g}-margin{margin:g}-E{emphasis:g}"
                "D{deemphasis:g}A{attenuation:g}-seed{seed}")
        return text.format(**vars(self)).replace(os.sep, "_")

    def arguments(self, function):
        """The settings that a function takes, by name."""
        names = function.__kwdefaults__
        return {name: value for name, value in vars(self).items() if name in names}

def preset(dataset, encoder=None):
    """What belongs to a data set and an encoder: Config(**preset("cifar10", "small")). The default
    is small, as resnet18 takes days on a CPU, but for photographs on CUDA."""
    photograph = dataset not in GLYPHS
    default = "resnet18" if photograph and torch.cuda.is_available() else "small"
    values = dict(dataset=dataset, encoder=encoder or default)
    if photograph:
        values |= dict(unseen=(), crop_min=0.2, gray_prob=0.1, flip=dataset != "svhn",
                       batch_size=128, epochs=20)
    if values["encoder"] == "resnet18":
        values |= dict(temperature=0.5, batch_size=512, lr=0.06, epochs=100)
    return values

def load_data(config):
    """Images to train on, and {name: (train, test)} to probe on, the seen set first."""
    how, sets = (config.data_dir, config.max_images), {}
    for name in (config.dataset, *config.unseen):
        train = load_images(name, "train", *how)
        if config.validation:
            fifth = len(train[1]) // 5
            sets[name] = [x[fifth:] for x in train], [x[:fifth] for x in train]
        else:
            sets[name] = train, load_images(name, "test", *how)
    images, _ = sets[config.dataset][0]
    if config.batch_size > len(images):
        raise UserError(f"batch_size {config.batch_size} is more than {len(images)} images")
    return images, sets

def gather(z):
    """(n, dim) -> (WORLD * n, dim) of all processes, with a gradient for this one's rows."""
    if WORLD == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(WORLD)]
    dist.all_gather(parts, z.detach())
    parts[RANK] = z
    return torch.cat(parts)

@torch.no_grad()
def measure(loss, others, c, log_E, log_D, log_A, temperature):
    """What a step logs; E, D, A also where they are off. weight = 1 - p: how much an anchor does in
    NT-Xent, weight_A with A; pull: how hard it pulls on the sphere, pull_ED with E and D."""
    theta, E, D, A = c.clamp(-1, 1).acos(), log_E.exp(), log_D.exp(), log_A.exp()
    weight = torch.sigmoid(others - c / temperature)
    pull = weight * theta.sin()  # dc = -sin(theta) dtheta
    return dict(
        loss=loss, angle=theta.rad2deg(), E=E, D=D, A=A, log_E=log_E, log_D=log_D.clamp(min=-5),
        log_A=log_A, pull=pull, pull_ED=pull * E * D, weight=weight, weight_A=weight * A)

def train_epoch(network, optimizer, images, epoch, config):
    """One pass over images (N, 3, 32, 32) uint8, on their device: a row of metrics.csv, means over
    steps and anchors. Seeded by (seed, epoch, process). Waits for the GPU at its end only."""
    start, device, sums = time.perf_counter(), images.device, {}
    steps, seed = len(images) // config.batch_size, config.seed * 1_000_003 + epoch
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches = order[:steps * config.batch_size].view(steps, -1)[:, RANK::WORLD].to(device)
    torch.manual_seed(seed * 1_009 + RANK)
    network.train()
    for step, batch in enumerate(batches):
        progress = (epoch + (step + 0.5) / steps) / config.epochs  # a tenth up, then a cosine
        share = min(progress / 0.1, (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2)
        optimizer.param_groups[0]["lr"] = share * config.lr * config.batch_size / 256
        views = augment(images[batch].repeat(2, 1, 1, 1) / 255, **config.arguments(augment))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            _, z = network(views)
        z1, z2 = z.chunk(2)
        c, others = pair_terms(gather(z1), gather(z2), temperature=config.temperature)
        loss, *rest = margin_loss(c, others, **config.arguments(margin_loss), return_factors=True)
        optimizer.zero_grad()
        loss.backward()
        if WORLD > 1:  # each process has its own rows' share of the gradient
            for weight in network.parameters():
                dist.all_reduce(weight.grad)
        optimizer.step()
        for name, value in measure(loss, others, *rest, config.temperature).items():
            sums[name] = sums.get(name, 0) + value.mean() / steps
    row = {name: value.item() for name, value in sums.items()}
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(f"loss {row['loss']} in epoch {epoch + 1}: lower --lr")
    rate = steps * config.batch_size / (time.perf_counter() - start)
    return dict(epoch=epoch + 1, **row, images_per_second=rate)

def read_checkpoint(folder):
    """A run's checkpoint, with its Config and Model."""
    try:
        state = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
        config = Config(**state["config"])
        model = Model(config.encoder)
        model.load_state_dict(state["model"])
    except Exception as error:
        raise UserError(f"no checkpoint in {folder}: {error}")
    return state | dict(config=config, model=model.eval())

def load_model(folder):
    """The trained Model of a run folder."""
    return read_checkpoint(folder)["model"]

def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

def run(config, on_epoch=None, *, folder=None, untrained=True, verbose=True):
    """One whole run: data, training, probes. Returns results.json. on_epoch(row, model) gets each
    epoch's row of metrics.csv. folder: to begin or go on in, else a new one. untrained: probe the
    untrained encoder, too."""
    say = print if verbose and RANK == 0 else lambda *_: None
    device, history = torch.device(config.device), []
    folders = (Path(config.out, f"{config.name()}-{number}") for number in itertools.count(1))
    folder = Path(folder) if folder else next(path for path in folders if not path.exists())
    state = read_checkpoint(folder) if (folder / "checkpoint.pt").exists() else None
    if state and state["config"] != config:
        raise UserError(f"{folder} holds a run with other settings")
    results_file = folder / "results.json"
    if results_file.exists():
        say(f"{folder} has finished")
        return json.loads(results_file.read_text())
    images, sets = load_data(config)
    say(f"{folder}: {len(images):,} images, {config.encoder} encoder, {device}")
    torch.manual_seed(config.seed)
    model = Model(config.encoder).to(device, memory_format=torch.channels_last)
    probes = [dict(dataset=name, role="unseen" if i else "seen") for i, name in enumerate(sets)]
    for row, data in zip(probes, sets.values()):
        if untrained and RANK == 0:
            row["random_linear"], row["random_knn"] = probe(model, *data)
    if WORLD > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.backends.cudnn.benchmark = True
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-4)
    if state:
        model.load_state_dict(state["model"].state_dict())
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    network, images = torch.compile(model) if config.compile else model, images.to(device)
    try:
        for epoch in range(len(history), config.epochs):
            row = train_epoch(network, optimizer, images, epoch, config)
            history.append(row)
            if RANK == 0:
                folder.mkdir(parents=True, exist_ok=True)
                state = dict(config=vars(config), history=history)
                state |= dict(model=model.state_dict(), optimizer=optimizer.state_dict())
                torch.save(state, folder / "partial.pt")
                os.replace(folder / "partial.pt", folder / "checkpoint.pt")
                write_csv(folder / "metrics.csv", history)
            say("epoch {epoch}  NT-Xent {loss:.3f}  angle {angle:.1f} deg  E {E:.3f}  D {D:.3f}  "
                "A {A:.3f}  {images_per_second:,.0f} images/s".format(**row))
            if on_epoch:
                on_epoch(row, model)
    except KeyboardInterrupt:
        if history:
            say(f"\nstopped. To go on: python margin_contrastive.py --resume {folder}")
        raise
    if RANK > 0:
        return dict(probes=[])
    for row, data in zip(probes, sets.values()):
        row["linear"], row["knn"] = probe(model, *data)
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    figure.suptitle(folder.name)
    panels = ["loss"], ["angle"], ["log_E", "log_D", "log_A"]
    for axes, names in zip(figure.subplots(1, 3), panels):
        for name in names:
            axes.plot(range(1, len(history) + 1), [row[name] for row in history], "o-", label=name)
        axes.set(xlabel="epoch")
        axes.legend()
    figure.savefig(folder / "curves.png", dpi=150)
    means = {name: sum(row[name] for row in history) / len(history) for name in history[0]}
    results = dict(
        config=vars(config), probes=probes, means=means, folder=str(folder),
        torch=torch.__version__, peak_gpu_mb=torch.cuda.max_memory_allocated() / 2**20)
    results_file.write_text(json.dumps(results, indent=2))
    return results

# ---- 7. Ablation
OFF = dict(emphasis=0.0, deemphasis=0.0, attenuation=0.0, positive_scale=1.0)  # NT-Xent
ON = dict.fromkeys(OFF, 1.0)  # the margin
SWITCHES = {
    "NT-Xent": OFF, "E": OFF | dict(emphasis=1.0), "D": OFF | dict(deemphasis=1.0),
    "A": OFF | dict(attenuation=1.0), "E+D": ON | dict(attenuation=0.0),
    "E+A": ON | dict(deemphasis=0.0), "D+A": ON | dict(emphasis=0.0), "E+D+A": ON}

def matched_controls(rows, config):
    """Controls blind to angle and probability: a constant that pulls as much in total as E * D in
    ablate's rows of E+D+A, a learning rate that steps as far as A."""
    full = [row for row in rows if row["setting"] == "E+D+A" and row["pull"] > 0]
    if not full:
        return {}
    s = sum(row["pull_ED"] for row in full) / sum(row["pull"] for row in full)
    a = sum(row["weight_A"] for row in full) / sum(row["weight"] for row in full)
    s, a = float(f"{s:.3g}"), float(f"{a:.3g}")
    return {f"pull x {s}": OFF | dict(positive_scale=s), f"lr x {a}": OFF | dict(lr=a * config.lr)}

def ablation_run(job):
    """(setting, Config, folder) -> a row of ablate, a short one if the run diverges."""
    setting, config, folder = job
    torch.set_num_threads(1)
    row = dict(setting=setting, seed=config.seed)
    try:
        results = run(config, folder=folder, untrained=False, verbose=False)
    except FloatingPointError:
        return row
    for role, kind in itertools.product(("seen", "unseen"), ("linear", "knn")):
        values = [probed[kind] for probed in results["probes"] if probed["role"] == role]
        row[f"{role}_{kind}"] = sum(values) / len(values) if values else math.nan
    return row | results["means"]

def ablate(settings, seeds, config, folder, say=print):
    """Train with all settings, {name: overrides of config}, and seeds; a seed's runs share weights,
    batches and views. Returns a dict a run, as in folder/runs.csv, nan if it diverged. Goes on
    where it stopped. Scripts need `if __name__ == "__main__":`."""
    load_data(config)  # so that the workers do not download side by side
    jobs, rows = [], []
    for seed, name in itertools.product(seeds, settings):
        job = replace(config, **settings[name], seed=seed)
        jobs.append((name, job, Path(folder, f"{name}-seed{seed}")))
    finished = sum((job_folder / "results.json").exists() for _, _, job_folder in jobs)
    say(f"{len(jobs)} runs in {folder}, {finished} finished")
    workers = torch.get_num_threads() if config.device == "cpu" else 1
    deaf = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # to Ctrl-C
    with multiprocessing.get_context("spawn").Pool(workers, *deaf) as pool:
        for row in pool.imap(ablation_run, jobs):
            rows.append(row)
            say(f"{len(rows)}/{len(jobs)}  {row['setting']}, seed {row['seed']}")
    rows = [dict.fromkeys(max(rows, key=len), math.nan) | row for row in rows]
    write_csv(Path(folder, "runs.csv"), rows)
    return rows

def by_setting(rows, column):
    """{setting: (a column of rows by seed, its differences to the first setting's)}."""
    values = {}
    for row in rows:
        values.setdefault(row["setting"], []).append(row[column])
    values = {setting: torch.tensor(x) for setting, x in values.items()}
    return {setting: (x, x - values[rows[0]["setting"]]) for setting, x in values.items()}

def print_table(rows):
    """Print ablate's linear probes in %, differences to line 1 paired by seed."""
    print("setting          seen    difference  unseen    difference  failed  log E  log D  log A")
    seen, unseen = by_setting(rows, "seen_linear"), by_setting(rows, "unseen_linear")
    for setting in seen:
        line = f"{setting:15}"
        for x, gain in (seen[setting], unseen[setting]):
            error = (gain.var(correction=0) / (len(gain) - 1)).sqrt()
            line += f"{x.mean():6.1f} {gain.mean():+7.1f} +- {error:3.1f}"
        line += f"{(~(seen[setting][1] > -10)).sum():8}"
        for column in ("log_E", "log_D", "log_A"):
            line += f"{by_setting(rows, column)[setting][0].mean():7.3f}"
        print(line)
    print(f"{len(gain)} seeds, +- standard error; failed: diverged, or 10 points below line 1")

def draw_ablation(rows):
    """A Figure of print_table's differences: a dot for a seed, a bar for the mean."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, role in zip(figure.subplots(1, 2, sharey=True), ("seen", "unseen")):
        for setting, (_, gain) in by_setting(rows, f"{role}_linear").items():
            axes.plot(gain, [setting] * len(gain), "ko", alpha=0.4)
            axes.plot(gain.mean(), setting, "k|", markersize=18)
        axes.axvline(0, color="grey")
        axes.set(xlabel=f"linear probe, {role}: points above {rows[0]['setting']}")
    axes.invert_yaxis()
    return figure

# ---- 8. Command line
def make_parser():
    """A flag for each line of Config, and three more."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    source, _, _ = inspect.getsource(Config).partition("    def ")
    # a line of its own names a group; else "METAVAR: help"
    for name, comment in re.findall(r"^    (\w*).*?# (.*)", source, re.M):
        metavar, _, text = comment.rpartition(": ")
        if not name:
            group = parser.add_argument_group(text)
            continue
        kind, flag = Config.__annotations__[name], "--" + name.replace("_", "-")
        special = {bool: dict(action=argparse.BooleanOptionalAction),
                   tuple: dict(action="append", metavar=metavar)}
        options = special.get(kind, dict(type=kind, metavar=metavar))
        group.add_argument(flag, help=f"{text} (letters: {getattr(Config, name)})", **options)
        if name in ("emphasis", "deemphasis", "attenuation"):
            group.add_argument(f"--no-{name}", dest=name, action="store_const", const=0.0)
    group = parser.add_argument_group("runs")
    group.add_argument(
        "--ablate", action="store_true", help="all switches and two controls, 10 runs a seed (2 "
        "minutes for letters), in a folder in OUT")
    group.add_argument("--seeds", type=int, metavar="N", help="seeds of --ablate (3)")
    group.add_argument("--resume", metavar="FOLDER", help="go on with a stopped run")
    return parser

def main(argv=None):
    """The command line."""
    parser = make_parser()
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0], parser._option_string_actions, 1)
        parser.error(f"there is no {unknown[0]}; is it {' or '.join(close) or 'in --help'}?")
    given = vars(given)
    ablation, seeds, folder = [given.pop(name, None) for name in ("ablate", "seeds", "resume")]
    if folder and (given or ablation) or ablation and WORLD > 1:
        parser.error("--resume goes alone, --ablate without torchrun")
    if seeds is not None and not (ablation and seeds > 0):
        parser.error("--seeds goes with --ablate and is at least 1")
    try:
        defaults = preset(given.get("dataset", "glyphs"), given.get("encoder"))
        config = read_checkpoint(folder)["config"] if folder else Config(**defaults | given)
    except (UserError, ValueError) as error:
        parser.error(str(error).splitlines()[0])
    try:
        if WORLD > 1:
            if config.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group()
        if not ablation:
            for row in run(config, folder=folder)["probes"]:
                print("{dataset} ({role}): linear probe {linear:.1f}% (untrained "
                      "{random_linear:.1f}%), kNN {knn:.1f}% ({random_knn:.1f}%)".format(**row))
            return
        folder = Path(config.out, f"ablation-{config.name()}")
        seeds = range(config.seed, config.seed + (seeds or 3))
        rows = ablate(SWITCHES, seeds, config, folder)
        rows = ablate(SWITCHES | matched_controls(rows, config), seeds, config, folder)
        draw_ablation(rows).savefig(folder / "figure.png", dpi=150)
        print_table(rows)
    except (UserError, FloatingPointError, OSError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {str(error).splitlines()[0]}\n")
    except KeyboardInterrupt:
        parser.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
