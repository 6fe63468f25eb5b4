"""The official recipe's input transforms, in Pillow as torchvision and timm would run them.

The opponent in `input_pipeline.py`; nothing else uses it.
"""

import io
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

GREY = (128, 128, 128)


def crop_box(width, height):
    """Random area 0.08..1 and ratio 3/4..4/3, ten tries, then the centre."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def affine(image, *matrix):
    """Moves pixels with a random interpolation."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, interpolation(), fillcolor=GREY
    )


def interpolation():
    """Bilinear or bicubic at random."""
    return random.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))


def cutout(image, m):
    """A filled square around a random place."""
    half = max(2, m * 4) / 2
    x, y = random.uniform(0, image.width), random.uniform(0, image.height)
    image = image.copy()
    box = (max(0, x - half), max(0, y - half), x + half, y + half)
    ImageDraw.Draw(image).rectangle(box, (125, 122, 113))
    return image


def sign():
    """One or minus one."""
    return random.choice((-1, 1))


def factor(m):
    """Argument of the enhancing operations."""
    return m / 10 * 1.8 + 0.1


def posterize(image, m):
    """Pillow refuses 0 bits."""
    bits = int(m / 10 * 4)
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


def add_below_128(image, m):
    """SolarizeAdd as a table."""
    table = [min(255, v + int(m / 10 * 110)) if v < 128 else v for v in range(256)]
    return image.point(table * 3)


OPERATIONS = (
    lambda p, m: ImageOps.autocontrast(p),
    lambda p, m: ImageOps.equalize(p),
    lambda p, m: ImageOps.invert(p),
    lambda p, m: p.rotate(sign() * m * 3, resample=interpolation(), fillcolor=GREY),
    posterize,
    lambda p, m: ImageOps.solarize(p, int(m / 10 * 256)),
    add_below_128,
    lambda p, m: ImageEnhance.Color(p).enhance(factor(m)),
    lambda p, m: ImageEnhance.Contrast(p).enhance(factor(m)),
    lambda p, m: ImageEnhance.Brightness(p).enhance(factor(m)),
    lambda p, m: ImageEnhance.Sharpness(p).enhance(factor(m)),
    lambda p, m: affine(p, 1, sign() * m * 0.03, 0, 0, 1, 0),
    lambda p, m: affine(p, 1, 0, 0, sign() * m * 0.03, 1, 0),
    lambda p, m: affine(p, 1, 0, sign() * m * 0.045 * p.width, 0, 1, 0),
    lambda p, m: affine(p, 1, 0, 0, 0, 1, sign() * m * 0.045 * p.height),
    cutout,
)


def transform(data: bytes, size: int, rand_augment: bool) -> np.ndarray:
    """Bytes of an image to uint8 (size, size, 3), not yet normalized."""
    with Image.open(io.BytesIO(data)) as image:
        image = image.convert("RGB")
    image = image.crop(crop_box(*image.size))
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rand_augment:
        for _ in range(2):
            image = random.choice(OPERATIONS)(image, random.randint(0, 14))
    return np.asarray(image)
