"""Edits of drawn scenes: one object replaced by another kind, the truth beside it."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq

from diffedit_ray.demo import demo_images, demo_masks, demo_scenes
from diffedit_ray.demo.scenes import KINDS, draw_scene
from diffedit_ray.evaluation.known_truth import KnownEdit

HELD_OUT = 5_000_000
"""Seeds from here on are never trained on."""


def known_edit(seed: int) -> KnownEdit:
    """The edit that `seed` names: its scene, which object changes and into what."""
    scene = draw_scene(seed)
    rng = np.random.default_rng((seed, 1))
    index = int(rng.integers(len(scene.objects)))
    changed = scene.objects[index]
    new_kind = str(rng.choice([kind for kind in KINDS if kind not in scene.kinds]))
    return KnownEdit(
        image=scene.image,
        reference=scene.caption,
        query=scene.caption_with(index, new_kind),
        truth=changed.alpha >= 128,
        box=changed.box,
        kind=changed.kind,
        new_kind=new_kind,
        seed=seed,
    )


def shipped_edits() -> list[KnownEdit]:
    """The edits of the shipped pictures; unlike `known_edit` these need no font."""
    images = demo_images()
    return [
        KnownEdit(
            image=images[row["name"]],
            reference=row["reference"],
            query=row["query"],
            truth=demo_masks(row["name"])[row["index"]] >= 128,
            box=tuple(row["box"]),
            kind=row["kind"],
            new_kind=row["new_kind"],
            seed=row["seed"],
        )
        for row in pq.read_table(demo_scenes()).to_pylist()
    ]
