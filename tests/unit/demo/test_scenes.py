"""Scenes and their images."""

from __future__ import annotations

import random

import numpy as np

from qmixlora.demo.scenes import GRID, draw_scene, sample_scene


def test_every_thing_of_a_scene_has_a_cell_of_its_own() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = sample_scene(rng, range(100))
        assert len({item.cell for item in scene.items} | {scene.digit_cell, scene.sign_cell}) == GRID * GRID


def test_an_image_of_one_cell_shows_that_cell_alone() -> None:
    scene = sample_scene(random.Random(1), range(10))
    whole, alone = np.asarray(draw_scene(scene)), np.asarray(draw_scene(scene, 1))
    assert (whole[:16, 16:] == alone[:16, 16:]).all()
    assert alone[16:].max() < 40 < whole[16:].max()
