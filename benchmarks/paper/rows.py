"""Rows of the paper's closed sets as lmms-eval's tasks ask for them: image, question, answer.

The questions are ours: the paper's own are not in its repository. They name the options, since answers are compared
exactly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

Row = Mapping[str, Any]

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = tuple(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
    shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".replace(
        "_", "-"
    ).split()
)
OF_COCO, OF_FLICKR = "COCO_IMAGES", "FLICKR30K_IMAGES"


def image(row: Row) -> list[Image.Image]:
    """The image inside of a row."""
    return [row["img" if "img" in row else "image"].convert("RGB")]


def mnist_question(row: Row) -> str:
    return _question("Which digit is this?", map(str, range(10)))


def mnist_answer(row: Row) -> str:
    return str(row["label"])


def cifar10_question(row: Row) -> str:
    return _question("What is in the image?", CIFAR10)


def cifar10_answer(row: Row) -> str:
    return CIFAR10[row["label"]]


def cifar100_question(row: Row) -> str:
    return _question("What is in the image?", CIFAR100)


def cifar100_answer(row: Row) -> str:
    return CIFAR100[row["fine_label"]]


def vsr_image(row: Row) -> list[Image.Image]:
    return [_opened(OF_COCO, row["image"])]


def vsr_question(row: Row) -> str:
    return _question(f"Is this true of the image? {row['caption']}", ("yes", "no"))


def vsr_answer(row: Row) -> str:
    return "yes" if row["label"] else "no"


def snli_ve_image(row: Row) -> list[Image.Image]:
    return [_opened(OF_FLICKR, f"{row['Flickr30K_ID']}.jpg")]


def snli_ve_question(row: Row) -> str:
    asked = f"What is the relation of the image to this sentence? {row['sentence2']}"
    return _question(asked, ("entailment", "neutral", "contradiction"))


def _question(asked: str, options: Any) -> str:
    return f"{asked}\nOptions: {', '.join(options)}\nAnswer with one of the options."


def _opened(variable: str, name: str) -> Image.Image:
    """An image of a collection that the data set only names. Raises FileNotFoundError."""
    folder = os.environ.get(variable)
    if folder is None:
        raise FileNotFoundError(f"Set {variable} to the folder of the images that this data set names, such as {name}.")
    return Image.open(Path(folder) / name).convert("RGB")
