"""Draws what the package ships: scenes, their true masks, and the demo's manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffedit_ray.demo import demo_settings
from diffedit_ray.demo.edits import HELD_OUT, known_edit
from diffedit_ray.demo.scenes import Scene, caption, draw_scene
from diffedit_ray.settings import EditSettings

_CHOSEN = (
    (("horse",), "grass", 0, ("zebra", "cow", "lion", "panda", "fox")),
    (("apple",), "wood", 0, ("pear", "orange")),
    (("pear", "cat"), "wood", 1, ("dog",)),
    (("cat",), "snow", 0, ("dog", "rabbit")),
    (("house",), "snow", 0, ("mushroom",)),
    (("car",), "sand", 0, ("bus",)),
    (("banana", "orange"), "sand", 1, ("apple",)),
    (("bear",), "sea", 0, ("koala",)),
    (("rose",), "night", 0, ("sunflower",)),
    (("lion", "tomato"), "bricks", 0, ("tiger",)),
    (("tree",), "sky", 0, ("cactus",)),
    (("frog",), "grass", 0, ("pig",)),
    (("strawberry", "lemon"), "wood", 0, ("tomato",)),
    (("monkey",), "bricks", 0, ("panda",)),
    (("star",), "night", 0, ("pumpkin",)),
    (("fox", "pear"), "grass", 0, ("dog",)),
)
"""Kinds, background, which object changes, into what: the demo's pictures."""

SHIPPED = 48


def write_assets(folder: Path) -> None:
    """Write images/, masks/, scenes.parquet and manifest.parquet below `folder`.

    Raises:
        FileNotFoundError: The emoji font is not installed.
    """
    truth: list[dict[str, Any]] = []
    manifest: list[dict[str, Any]] = []
    for i, (kinds, background, index, queries) in enumerate(_CHOSEN):
        scene = draw_scene(HELD_OUT - 1 - i, kinds=kinds, background=background)
        name = _save(scene, folder)
        truth.append(_truth(name, scene, index, queries[0]))
        manifest += [_row(name, scene.caption, scene.caption_with(index, kind), f"replace-{kind}") for kind in queries]
    for seed in range(HELD_OUT, HELD_OUT + SHIPPED - len(_CHOSEN)):
        scene, edit = draw_scene(seed), known_edit(seed)
        index = scene.kinds.index(edit.kind)
        truth.append(_truth(_save(scene, folder, f"-{seed - HELD_OUT:02d}"), scene, index, edit.new_kind))
    horse, both = "horse-grass", "pear-cat-wood"
    manifest += [
        _row(horse, None, caption(["zebra"], "grass"), "no-reference"),
        _row(horse, caption(["horse"], "grass"), caption(["horse"], "grass"), "same-texts"),
        _row(both, caption(["pear", "cat"], "wood"), caption(["apple", "cat"], "wood"), "drawn-mask")
        | {"mask_uri": f"masks/{both}.0.png"},
        _row("no-such-picture", None, caption(["zebra"], "grass"), "must-fail"),
    ]
    pq.write_table(pa.Table.from_pylist(truth), folder / "scenes.parquet")
    pq.write_table(pa.Table.from_pylist(manifest, schema=_MANIFEST), folder / "manifest.parquet")


_MANIFEST = pa.schema(
    [
        ("image_uri", pa.string()),
        ("reference", pa.string()),
        ("query", pa.string()),
        ("mask_uri", pa.string()),
        ("mask_strength", pa.float64()),
        ("mask_threshold", pa.float64()),
        ("mask_grow", pa.int32()),
        ("guidance_scale", pa.float64()),
        ("purpose", pa.string()),
    ]
)


def _row(name: str, reference: str | None, query: str, purpose: str) -> dict[str, Any]:
    settings = demo_settings()
    return {
        "image_uri": f"images/{name}.png",
        "reference": reference,
        "query": query,
        "mask_uri": None,
        **{name: getattr(settings, name) for name in _MANIFEST.names if name in EditSettings.model_fields},
        "purpose": purpose,
    }


def _save(scene: Scene, folder: Path, suffix: str = "") -> str:
    name = "-".join([*scene.kinds, scene.background]) + suffix
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(folder / "images" / f"{name}.png", optimize=True)
    for i, drawn in enumerate(scene.objects):
        Image.fromarray(drawn.alpha).save(folder / "masks" / f"{name}.{i}.png", optimize=True)
    return name


def _truth(name: str, scene: Scene, index: int, new_kind: str) -> dict[str, Any]:
    changed = scene.objects[index]
    return {
        "name": name,
        "seed": scene.seed,
        "reference": scene.caption,
        "query": scene.caption_with(index, new_kind),
        "kind": changed.kind,
        "new_kind": new_kind,
        "index": index,
        "box": list(changed.box),
    }
