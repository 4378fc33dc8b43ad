"""DiffEdit (Couairon et al. 2022, arXiv 2210.11427): the three steps, in the paper's order."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffedit_ray.diffusion.framing import finish, fit, frame_for, latent_mask_from, over_white, pixel_alpha
from diffedit_ray.diffusion.mask import average_contrast, binarise, clip_extremes, noise_contrast, rescale, significance
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.noise import row_noise
from diffedit_ray.diffusion.schedule import add_noise
from diffedit_ray.settings import EditSettings

logger = logging.getLogger(__name__)

ImageLike = Image.Image | NDArray[np.uint8]


@dataclass
class LatentEdit:
    """What the three steps give for a batch at the model's own size.

    Attributes:
        pixels: (B, 3, H, W) uint8, the decoded edit; the input itself where the mask is empty.
        contrast: (B, h, w) float32 in [0, 1]; the mask itself where one was given.
        mask: (B, h, w) bool.
        significance: (B,) float32, the contrast's F ratio; NaN where a mask was given.
        seconds: Spent in "mask", "encode" and "decode", for the whole batch.
    """

    pixels: Tensor
    contrast: Tensor
    mask: Tensor
    significance: Tensor
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class EditResult:
    """Edited images at their own sizes, row by row.

    Attributes:
        images: (H, W, 3) or, if alpha came in, (H, W, 4) uint8.
        masks: (H, W) uint8; 255 = edited, 0 = the original's own pixel.
        contrasts: (h, w) float32 in [0, 1], the soft contrast in latent cells.
        latent_masks: (h, w) bool, the mask that guided decoding.
        significance: The contrast's F ratio (`mask.significance`).
        seconds: Spent in "mask", "encode" and "decode", for the whole batch.
    """

    images: list[NDArray[np.uint8]]
    masks: list[NDArray[np.uint8]]
    contrasts: list[NDArray[np.float32]]
    latent_masks: list[NDArray[np.bool_]]
    significance: list[float]
    seconds: dict[str, float]

    @property
    def unchanged(self) -> list[bool]:
        """Rows whose mask is empty: the texts do not disagree about the image."""
        return [not mask.any() for mask in self.latent_masks]


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
        # in batches of other sizes than a power of two, some kernels round by a sample's place in the batch
        self.unet_batch = 1 << (unet_batch - 1).bit_length() if reproducible else unet_batch
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
        settings: EditSettings | None = None,
    ) -> EditResult:
        """Edit images of any sizes.

        Args:
            images: PIL images or (H, W, 3 or 4) uint8 arrays. Alpha is kept and the model sees white behind it.
            references: What each image shows now; none or "" is the paper's ∅.
            queries: What each should show.
            seeds: Each row's seed.
            masks: For each row a hand-drawn (H, W) uint8 mask, 255 = edit, or none to find one.
            settings: Instead of the editor's own.

        Raises:
            ValueError: The arguments differ in length, or an image or mask has another shape or type.
        """
        settings = settings or self.settings
        masks = masks if masks is not None else [None] * len(images)
        lengths = {len(images), len(references), len(queries), len(seeds), len(masks)}
        if len(lengths) != 1:
            raise ValueError("images, references, queries, seeds and masks must have one entry a row each")
        originals = [_as_array(image) for image in images]
        frames = [frame_for(o.shape[1], o.shape[0], self.model.geometry, settings.resolution) for o in originals]
        for original, drawn in zip(originals, masks, strict=True):
            if drawn is not None and (drawn.shape != original.shape[:2] or drawn.dtype != np.uint8):
                raise ValueError(
                    f"a {drawn.dtype} mask of shape {drawn.shape} for an image of shape {original.shape[:2]}; "
                    "a mask must be (H, W) uint8, 255 = edit"
                )
        groups: dict[tuple[int, int, bool], list[int]] = {}
        for i, frame in enumerate(frames):
            groups.setdefault((frame.model_height, frame.model_width, masks[i] is not None), []).append(i)
        rows: dict[int, tuple[LatentEdit, int]] = {}
        seconds: dict[str, float] = {}
        for (_, _, drawn_masks), members in groups.items():
            fitted = np.stack([fit(over_white(originals[i]), frames[i]) for i in members])
            given = [latent_mask_from(m, frames[i]) for i in members if (m := masks[i]) is not None]
            edit = self.edit_fitted(
                torch.from_numpy(fitted).permute(0, 3, 1, 2),
                [references[i] for i in members],
                [queries[i] for i in members],
                [seeds[i] for i in members],
                masks=torch.from_numpy(np.stack(given)) if drawn_masks else None,
                content=torch.from_numpy(np.stack([frames[i].content_cells for i in members])),
                settings=settings,
            )
            rows.update((i, (edit, j)) for j, i in enumerate(members))
            for name, spent in edit.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + spent
        result = EditResult([], [], [], [], [], seconds)
        for i, (original, frame) in enumerate(zip(originals, frames, strict=True)):
            edit, j = rows[i]
            latent_mask = edit.mask[j].numpy()
            drawn = masks[i]
            alpha = drawn if drawn is not None else pixel_alpha(latent_mask, frame, settings.mask_grow)
            edited = edit.pixels[j].permute(1, 2, 0).numpy()
            result.images.append(finish(original, edited, alpha, frame, composite=settings.composite))
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
        masks: Tensor | None = None,
        content: Tensor | None = None,
        settings: EditSettings | None = None,
    ) -> LatentEdit:
        """The three steps on a batch already at a size the model accepts.

        Args:
            pixels: (B, 3, H, W) uint8.
            references: As `edit`.
            queries: As `edit`.
            seeds: As `edit`.
            masks: (B, h, w) bool latent masks that replace step 1.
            content: (B, h, w) bool, the cells that are not padding; none is all of them.
            settings: Instead of the editor's own.

        Raises:
            torch.OutOfMemoryError: One row alone does not fit into memory.
        """
        s = settings or self.settings
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
                        None if masks is None else masks[part],
                        None if content is None else content[part],
                        s,
                    )
                )
            except torch.OutOfMemoryError:
                self._use_less_memory(len(pixels[part]))
                continue
            done = part.stop
        return _joined(edits)

    def _use_less_memory(self, rows: int) -> None:
        """Called while memory has run out over `rows` rows: halve the batch, then what the UNet sees at once."""
        if rows > 1:
            self.batch_limit = rows // 2
        elif self.unet_batch > 1 and not self.reproducible:
            self.unet_batch //= 2
        else:
            raise
        logger.warning("out of memory with %d rows: now %s, UNet batch %d", rows, self.batch_limit, self.unet_batch)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _edit_part(
        self,
        pixels: Tensor,
        references: Sequence[str | None],
        queries: Sequence[str],
        seeds: Sequence[int],
        masks: Tensor | None,
        content: Tensor | None,
        s: EditSettings,
    ) -> LatentEdit:
        clock = time.perf_counter
        began = clock()
        whole = 1 if self.reproducible else max(1, len(pixels))
        x0 = torch.cat([self.model.encode_images(part.float() / 127.5 - 1) for part in torch.split(pixels, whole)])
        if masks is None:
            contrast, mask, f_ratio = self.find_masks(x0, references, queries, seeds, s)
        else:
            mask, contrast = masks, masks.float()
            f_ratio = torch.full((len(pixels),), torch.nan)
        if content is not None:
            mask = mask & content
        masked = clock()
        edited = pixels.clone()
        rows = mask.flatten(1).any(1).nonzero().flatten()
        encoded = decoded = masked
        if len(rows):
            path = self.encode(x0[rows.to(x0.device)], s)
            encoded = clock()
            y0 = self.decode(path, mask[rows], [queries[int(i)] for i in rows], s)
            decoded_parts = [self.model.decode_latents(part) for part in torch.split(y0, whole)]
            edited[rows] = ((torch.cat(decoded_parts) + 1) * 127.5).round().to(torch.uint8).cpu()
            decoded = clock()
        seconds = {"mask": masked - began, "encode": encoded - masked, "decode": decoded - encoded}
        return LatentEdit(edited, contrast, mask, f_ratio, seconds)

    def find_masks(
        self,
        x0: Tensor,
        references: Sequence[str | None],
        queries: Sequence[str],
        seeds: Sequence[int],
        s: EditSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step 1 (section 3.2): contrast (B, h, w) in [0, 1], mask (B, h, w), F ratio (B,), all on the CPU.

        Both texts see the same noise; no guidance here, it would only scale the contrast.
        """
        b, n = len(x0), s.mask_maps
        contrast = torch.zeros(b, n, *x0.shape[2:])
        texts = [(reference or "", query) for reference, query in zip(references, queries, strict=True)]
        rows = [i for i in range(b) if texts[i][0] != texts[i][1]]
        if rows:
            t = self.model.schedule.time_at(s.steps, s.mask_strength)
            z = torch.stack([row_noise(seeds[i], n, x0.shape[1:]) for i in rows]).to(x0.device)
            x_t = add_noise(x0[rows][:, None], z, self.model.schedule.alpha(t).to(x0.device)).flatten(0, 1)
            reference = self._embed([texts[i][0] for i in rows]).repeat_interleave(n, 0)
            query = self._embed([texts[i][1] for i in rows]).repeat_interleave(n, 0)
            d = noise_contrast(self._predict(x_t, t, query), self._predict(x_t, t, reference))
            contrast[rows] = d.reshape(len(rows), n, *d.shape[1:]).cpu()
        f_ratio = significance(contrast)
        soft = rescale(clip_extremes(average_contrast(contrast), s.mask_clip))
        mask = binarise(soft, s.mask_threshold) & (f_ratio >= s.mask_significance)[:, None, None]
        return soft, mask, f_ratio

    def encode(self, x0: Tensor, s: EditSettings) -> list[tuple[int, Tensor]]:
        """Step 2 (section 3.2): DDIM encoding under ∅ up to ratio r; (time, x_t) from the clean image up."""
        empty = self.model.embed_prompts([""]).expand(len(x0), -1, -1)
        times = self.model.schedule.path(s.steps, s.encoding_ratio)
        x, path = x0, [(times[0], x0)]
        for start, end in itertools.pairwise(times):
            # the estimate is taken at the time stepped to, the one decoding will step from: the two mirror each other
            x = self.model.schedule.step(x, self._predict(x, end, empty), start, end)
            path.append((end, x))
        return path

    def decode(
        self, path: Sequence[tuple[int, Tensor]], mask: Tensor, queries: Sequence[str], s: EditSettings
    ) -> Tensor:
        """Step 3 (section 3.2, eq. 3): decode with the query; outside the mask, x_t at the same t, down to x0."""
        query = self._embed(queries)
        empty = self.model.embed_prompts([""]).expand_as(query)
        start, y = path[-1]
        m = mask[:, None].to(y.device, y.dtype)
        for end, x in reversed(path[:-1]):
            output = self._predict(y, start, query)
            if s.guidance_scale != 1:
                unconditional = self._predict(y, start, empty)
                output = unconditional + s.guidance_scale * (output - unconditional)
            y = self.model.schedule.step(y, output, start, end)
            y = m * y + (1 - m) * x
            start = end
        return y

    def _predict(self, x: Tensor, t: int, embeddings: Tensor) -> Tensor:
        """The UNet over a batch of any length, `unet_batch` at a time."""
        size, n = self.unet_batch, len(x)
        x = x.contiguous()  # kernels, and so rounding, follow the layout, which slicing may have changed
        if self.reproducible and n % size:
            missing = size - n % size
            x, embeddings = (torch.cat([y, y[:1].expand(missing, *y.shape[1:])]) for y in (x, embeddings))
        parts = zip(torch.split(x, size), torch.split(embeddings, size), strict=True)
        return torch.cat([self.model.predict(latents, t, texts) for latents, texts in parts])[:n]

    def _embed(self, texts: Sequence[str]) -> Tensor:
        if self.reproducible:
            return torch.cat([self.model.embed_prompts([text]) for text in texts])
        return self.model.embed_prompts(texts)


def _joined(edits: Sequence[LatentEdit]) -> LatentEdit:
    """The parts of one batch as one."""
    if len(edits) == 1:
        return edits[0]
    whole = {name: torch.cat([getattr(e, name) for e in edits]) for name in ("pixels", "contrast", "mask")}
    seconds = {step: sum(e.seconds[step] for e in edits) for step in edits[0].seconds}
    return LatentEdit(**whole, significance=torch.cat([e.significance for e in edits]), seconds=seconds)


def _as_array(image: ImageLike) -> NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(f"an image must be (H, W, 3 or 4) uint8, not {image.shape} {image.dtype}")
    return image
