"""DiffEdit (Couairon et al. 2022, arXiv 2210.11427): the three steps, in the paper's order."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffedit_ray.diffusion.estimator import Estimator
from diffedit_ray.diffusion.framing import finish, fit, frame_for, latent_mask_from, over_white, pixel_alpha
from diffedit_ray.diffusion.mask import mask_from, noise_contrast
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.noise import row_noise
from diffedit_ray.diffusion.result import EditResult, LatentEdit
from diffedit_ray.diffusion.schedule import add_noise, grid_index
from diffedit_ray.diffusion.sharing import Comparison, Noised, distinct, estimates_wanted, longest_walks, walk_of
from diffedit_ray.diffusion.solver import Solver
from diffedit_ray.settings import EditSettings

logger = logging.getLogger(__name__)

ImageLike = Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class Path:
    """One picture's way from the clean image towards noise.

    Attributes:
        times: Training times, `CLEAN` first.
        latents: x_t at each of them, (C, h, w).
    """

    times: list[int]
    latents: list[Tensor]

    def up_to(self, steps: int) -> Path:
        """Its first `steps` steps: a lower encoding ratio is a prefix of a higher one."""
        return Path(self.times[: steps + 1], self.latents[: steps + 1])


class DiffEditor:
    """Edits batches of images in this process.

    Args:
        model: The replica to use.
        settings: The method's settings; `edit` can override them for one call.
        unet_batch: Latents the UNet sees at once, at most.
        reproducible: Run the networks on batches of one fixed size, the last one padded, and the autoencoder on
            one image at a time. A row's pixels then do not depend, to the last bit, on the rows beside it; the
            kernels that numerical libraries choose, and with them the rounding, depend on the shape of a batch.

    Where memory runs out (`torch.OutOfMemoryError`) the batch is halved, and `batch_limit` remembers the size
    that worked.

    Example:
        >>> from diffedit_ray import DiffEditor, EditSettings, LatentDiffusionModel
        >>> from diffedit_ray.demo import demo_images, demo_model
        >>> model = LatentDiffusionModel.load(demo_model(), device="cpu")
        >>> editor = DiffEditor(model, EditSettings(steps=10))
        >>> image = demo_images()["horse-grass"]
        >>> result = editor.edit([image], ["a horse on grass"], ["a zebra on grass"], seeds=[0])
        >>> result.images[0].shape, result.masks[0].shape
        ((128, 128, 3), (128, 128))
    """

    def __init__(
        self,
        model: LatentDiffusionModel,
        settings: EditSettings | None = None,
        *,
        unet_batch: int = 64,
        reproducible: bool = False,
    ) -> None:
        self.model = model
        self.settings = settings or EditSettings()
        self.estimate = Estimator(model, unet_batch, reproducible)
        self.reproducible = reproducible
        self.batch_limit: int | None = None

    def edit(
        self,
        images: Sequence[ImageLike],
        references: Sequence[str | None],
        queries: Sequence[str],
        seeds: Sequence[int],
        *,
        masks: Sequence[NDArray[np.uint8] | None] | None = None,
        settings: EditSettings | Sequence[EditSettings] | None = None,
    ) -> EditResult:
        """Edit images of any sizes. Rows that show the same image share what depends on it alone.

        Args:
            images: PIL images or (H, W, 3 or 4) uint8 arrays. Alpha is kept and the model sees white behind it.
            references: What each image shows now; none or "" is the paper's ∅.
            queries: What each should show.
            seeds: Each row's seed.
            masks: For each row a hand-drawn (H, W) uint8 mask, 255 = edit, or none to find one.
            settings: Instead of the editor's own: for all rows, or one for each.

        Raises:
            ValueError: The arguments differ in length, or an image or mask has another shape or type.
        """
        masks = masks if masks is not None else [None] * len(images)
        each = self._settings(settings, len(images))
        lengths = {len(images), len(references), len(queries), len(seeds), len(masks), len(each)}
        if len(lengths) != 1:
            raise ValueError("images, references, queries, seeds, masks and settings must have one entry a row each")
        originals = [_as_array(image) for image in images]
        frames = [
            frame_for(o.shape[1], o.shape[0], self.model.geometry, s.resolution)
            for o, s in zip(originals, each, strict=True)
        ]
        for original, drawn in zip(originals, masks, strict=True):
            if drawn is not None and (drawn.shape != original.shape[:2] or drawn.dtype != np.uint8):
                raise ValueError(
                    f"a {drawn.dtype} mask of shape {drawn.shape} for an image of shape {original.shape[:2]}; "
                    "a mask must be (H, W) uint8, 255 = edit"
                )
        sizes: dict[tuple[int, int], list[int]] = {}
        for i, frame in enumerate(frames):
            sizes.setdefault((frame.model_height, frame.model_width), []).append(i)
        rows: dict[int, tuple[LatentEdit, int]] = {}
        seconds: dict[str, float] = {}
        for members in sizes.values():
            fitted = np.stack([fit(over_white(originals[i]), frames[i]) for i in members])
            edit = self.edit_fitted(
                torch.from_numpy(fitted).permute(0, 3, 1, 2),
                [references[i] for i in members],
                [queries[i] for i in members],
                [seeds[i] for i in members],
                masks=[
                    None if (m := masks[i]) is None else torch.from_numpy(latent_mask_from(m, frames[i]))
                    for i in members
                ],
                content=torch.from_numpy(np.stack([frames[i].content_cells for i in members])),
                settings=[each[i] for i in members],
            )
            rows.update((i, (edit, j)) for j, i in enumerate(members))
            for name, spent in edit.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + spent
        result = EditResult([], [], [], [], [], seconds)
        for i, (original, frame) in enumerate(zip(originals, frames, strict=True)):
            edit, j = rows[i]
            latent_mask = edit.mask[j].numpy()
            drawn = masks[i]
            alpha = drawn if drawn is not None else pixel_alpha(latent_mask, frame, each[i].mask_grow)
            edited = edit.pixels[j].permute(1, 2, 0).numpy()
            result.images.append(finish(original, edited, alpha, frame, composite=each[i].composite))
            result.masks.append(alpha)
            result.contrasts.append(edit.contrast[j].numpy())
            result.latent_masks.append(latent_mask)
            result.significance.append(float(edit.significance[j]))
        return result

    def edit_fitted(
        self,
        pixels: Tensor,
        references: Sequence[str | None],
        queries: Sequence[str],
        seeds: Sequence[int],
        *,
        masks: Sequence[Tensor | None] | None = None,
        content: Tensor | None = None,
        settings: EditSettings | Sequence[EditSettings] | None = None,
    ) -> LatentEdit:
        """The three steps on a batch already at a size the model accepts.

        Args:
            pixels: (B, 3, H, W) uint8.
            references: As `edit`.
            queries: As `edit`.
            seeds: As `edit`.
            masks: For each row an (h, w) bool latent mask that replaces step 1, or none.
            content: (B, h, w) bool, the cells that are not padding; none is all of them.
            settings: As `edit`.

        Raises:
            torch.OutOfMemoryError: One row alone does not fit into memory.
        """
        masks = masks if masks is not None else [None] * len(pixels)
        each = self._settings(settings, len(pixels))
        edits: list[LatentEdit] = []
        done = 0
        while done < len(pixels) or not edits:
            part = slice(done, done + (self.batch_limit or len(pixels)))
            try:
                edits.append(
                    self._edit_part(
                        pixels[part],
                        references[part],
                        queries[part],
                        seeds[part],
                        masks[part],
                        None if content is None else content[part],
                        each[part],
                    )
                )
            except torch.OutOfMemoryError:
                self._use_less_memory(len(pixels[part]))
                continue
            done = part.stop
        return LatentEdit.joined(edits)

    def _use_less_memory(self, rows: int) -> None:
        """Called while memory has run out over `rows` rows: halve the batch, then what the UNet sees at once."""
        estimate = self.estimate
        if rows > 1:
            self.batch_limit = rows // 2
        elif estimate.unet_batch > 1 and not self.reproducible:
            estimate.unet_batch //= 2
        else:
            raise
        logger.warning("out of memory with %d rows: now %s, UNet batch %d", rows, self.batch_limit, estimate.unet_batch)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _edit_part(
        self,
        pixels: Tensor,
        references: Sequence[str | None],
        queries: Sequence[str],
        seeds: Sequence[int],
        masks: Sequence[Tensor | None],
        content: Tensor | None,
        settings: Sequence[EditSettings],
    ) -> LatentEdit:
        clock = time.perf_counter
        began = clock()
        whole = 1 if self.reproducible else max(1, len(pixels))
        pictures, first = distinct(pixels)
        x0 = torch.cat(
            [self.model.encode_images(part.float() / 127.5 - 1) for part in torch.split(pixels[first], whole)]
        )
        contrast, mask, f_ratio = self._masks(x0, pictures, references, queries, seeds, masks, settings)
        if content is not None:
            mask = mask & content
        masked = clock()
        edited = pixels.clone()
        rows = mask.flatten(1).any(1).nonzero().flatten().tolist()
        encoded = decoded = masked
        if rows:
            paths = self._paths(x0, [pictures[i] for i in rows], [settings[i] for i in rows])
            encoded = clock()
            y0 = self.decode(paths, mask[rows], [queries[i] for i in rows], [settings[i] for i in rows])
            decoded_parts = [self.model.decode_latents(part) for part in torch.split(y0, whole)]
            edited[rows] = ((torch.cat(decoded_parts) + 1) * 127.5).round().to(torch.uint8).cpu()
            decoded = clock()
        seconds = {"mask": masked - began, "encode": encoded - masked, "decode": decoded - encoded}
        return LatentEdit(edited, contrast, mask, f_ratio, seconds)

    def _masks(
        self,
        x0: Tensor,
        pictures: Sequence[int],
        references: Sequence[str | None],
        queries: Sequence[str],
        seeds: Sequence[int],
        masks: Sequence[Tensor | None],
        settings: Sequence[EditSettings],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `find_masks`; of rows that bring a mask, that mask."""
        drawn = {i: m for i, m in enumerate(masks) if m is not None}
        others = [i for i in range(len(masks)) if i not in drawn]
        mask = torch.zeros(len(masks), *x0.shape[2:], dtype=torch.bool)
        for i, m in drawn.items():
            mask[i] = m
        contrast, f_ratio = mask.float(), torch.full((len(masks),), torch.nan)
        contrast[others], mask[others], f_ratio[others] = self.find_masks(
            x0,
            [references[i] for i in others],
            [queries[i] for i in others],
            [seeds[i] for i in others],
            [settings[i] for i in others],
            pictures=[pictures[i] for i in others],
        )
        return contrast, mask, f_ratio

    def find_masks(
        self,
        x0: Tensor,
        references: Sequence[str | None],
        queries: Sequence[str],
        seeds: Sequence[int],
        settings: EditSettings | Sequence[EditSettings],
        pictures: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step 1 (section 3.2): contrast (B, h, w) in [0, 1], mask (B, h, w), F ratio (B,), all on the CPU.

        Both texts see the same noise; no guidance here, it would only scale the contrast. What a text makes of
        a picture under a seed's noise is estimated once, however many rows ask for it.

        Args:
            x0: (P, C, h, w) latents.
            references, queries, seeds, settings: Of B rows.
            pictures: Which latent each row edits; none is each its own.
        """
        schedule, each = self.model.schedule, self._settings(settings, len(queries))
        pictures = pictures if pictures is not None else range(len(queries))
        comparisons = [
            Comparison(
                Noised(picture, seed, schedule.time_at(s.steps, s.mask_strength)), query, reference or "", s.mask_maps
            )
            for picture, query, reference, seed, s in zip(pictures, queries, references, seeds, each, strict=True)
        ]
        outputs = self._contrasting(x0, estimates_wanted(comparisons))
        found = []
        for comparison, s in zip(comparisons, each, strict=True):
            d = torch.zeros(s.mask_maps, *x0.shape[2:])
            if comparison.estimates:
                query_output, reference_output = (outputs[key][: s.mask_maps] for key in comparison.estimates)
                d = noise_contrast(query_output, reference_output).cpu()
            found.append(mask_from(d, s))
        if not found:
            return torch.zeros(0, *x0.shape[2:]), torch.zeros(0, *x0.shape[2:], dtype=torch.bool), torch.zeros(0)
        soft, mask, f_ratio = (torch.stack(kind) for kind in zip(*found, strict=True))
        return soft, mask, f_ratio

    def _contrasting(self, x0: Tensor, wanted: Mapping[Noised, Mapping[str, int]]) -> dict[tuple[Noised, str], Tensor]:
        """The network's outputs for noised latents under a text, for as many noise samples as are wanted."""
        if not wanted:
            return {}
        x_t, samples = [], []
        for place, texts in wanted.items():
            n = max(texts.values())
            z = row_noise(place.seed, n, x0.shape[1:]).to(x0.device)
            x_t.append(add_noise(x0[place.picture], z, self.model.schedule.alpha(place.time).to(x0.device)))
            samples += [[(place, text) for text, maps in texts.items() if k < maps] for k in range(n)]
        outputs = self.estimate(
            torch.cat(x_t), [own[0][0].time for own in samples], [[text for _, text in own] for own in samples]
        )
        found: dict[tuple[Noised, str], list[Tensor]] = {}
        for key, output in zip(chain.from_iterable(samples), outputs, strict=True):
            found.setdefault(key, []).append(output)
        return {key: torch.stack(own) for key, own in found.items()}

    def _paths(self, x0: Tensor, pictures: Sequence[int], settings: Sequence[EditSettings]) -> list[Path]:
        """Each row's path; rows of one picture share the longest of theirs."""
        longest = longest_walks(pictures, settings)
        walked = self.encode(x0[[picture for picture, _, _ in longest]], list(longest.values()))
        paths = dict(zip(longest, walked, strict=True))
        return [
            paths[walk_of(picture, s)].up_to(grid_index(s.steps, s.encoding_ratio))
            for picture, s in zip(pictures, settings, strict=True)
        ]

    def encode(self, x0: Tensor, settings: EditSettings | Sequence[EditSettings]) -> list[Path]:
        """Step 2 (section 3.2): DDIM encoding of (B, C, h, w) latents under ∅ up to ratio r."""
        each = self._settings(settings, len(x0))
        solver = Solver(self.model.schedule, [s.solver for s in each])
        grids = [self.model.schedule.path(s.steps, s.encoding_ratio) for s in each]
        paths = [Path(times, [x]) for times, x in zip(grids, x0, strict=True)]
        for k in range(1, max(map(len, grids))):
            rows = [i for i, times in enumerate(grids) if k < len(times)]
            start, end = [grids[i][k - 1] for i in rows], [grids[i][k] for i in rows]
            x = torch.stack([paths[i].latents[-1] for i in rows])
            # the estimate is taken at the time stepped to, the one decoding will step from: the two mirror each other
            x = solver.step(rows, x, self.estimate(x, end, [[""]] * len(rows)), start, end)
            for i, x_t in zip(rows, x, strict=True):
                paths[i].latents.append(x_t)
        return paths

    def decode(
        self,
        paths: Sequence[Path],
        mask: Tensor,
        queries: Sequence[str],
        settings: EditSettings | Sequence[EditSettings],
    ) -> Tensor:
        """Step 3 (section 3.2, eq. 3): decode with the query; outside the mask, x_t at the same t, down to x0.

        Args:
            paths: Of B rows, which may differ in length; a row that has arrived costs nothing more.
            mask: (B, h, w) bool.
            queries, settings: Of the rows.
        """
        each = self._settings(settings, len(paths))
        solver = Solver(self.model.schedule, [s.solver for s in each])
        y = [path.latents[-1] for path in paths]
        m = mask[:, None].to(y[0].device, y[0].dtype)
        for k in range(1, max(len(path.times) for path in paths)):
            rows = [i for i, path in enumerate(paths) if k < len(path.times)]
            start, end = [paths[i].times[-k] for i in rows], [paths[i].times[-k - 1] for i in rows]
            y_t, x_t = torch.stack([y[i] for i in rows]), torch.stack([paths[i].latents[-k - 1] for i in rows])
            output = self._guided(y_t, start, [queries[i] for i in rows], [each[i].guidance_scale for i in rows])
            y_t = solver.step(rows, y_t, output, start, end)
            y_t = m[rows] * y_t + (1 - m[rows]) * x_t
            for i, y_i in zip(rows, y_t, strict=True):
                y[i] = y_i
        return torch.stack(y)

    def _guided(self, y: Tensor, times: Sequence[int], queries: Sequence[str], scales: Sequence[float]) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022, eq. 6); a scale of 1 is none and costs nothing."""
        texts = [[query, ""] if scale != 1 else [query] for query, scale in zip(queries, scales, strict=True)]
        outputs = torch.split(self.estimate(y, times, texts), [len(own) for own in texts])
        query, empty = (torch.stack([output[i] for output in outputs]) for i in (0, -1))
        return empty + torch.tensor(scales, device=y.device)[:, None, None, None] * (query - empty)

    def _settings(self, given: EditSettings | Sequence[EditSettings] | None, rows: int) -> list[EditSettings]:
        """One a row."""
        return [given or self.settings] * rows if given is None or isinstance(given, EditSettings) else list(given)


def _as_array(image: ImageLike) -> NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(f"an image must be (H, W, 3 or 4) uint8, not {image.shape} {image.dtype}")
    return image
