"""The first map stage of a planned row: fetch its image, and its mask if it brings one.

Every stage maps a table to a table of the same rows and the same columns (`work_schema`).
What goes wrong with a row is written into it, and it travels on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.images import decode_image, decode_mask, encode_image
from diffedit_ray.diffusion.framing import Geometry, fit, latent_mask_from, over_white
from diffedit_ray.errors import ErrorCode, RowError
from diffedit_ray.pipeline.guard import Guard
from diffedit_ray.pipeline.rows import PENDING, Row, fail, frame_of, map_rows, surprise, use_storage
from diffedit_ray.pipeline.together import all_at_once
from diffedit_ray.settings import JobSettings


@dataclass(frozen=True)
class Fetch:
    """URI to bytes to checked, fitted pixels, many at a time; an image that several rows name is read once.

    Its `fetch_seconds` are shared out evenly among them, so that a run's records add up to what was spent; a mask's
    are its row's own.
    """

    geometry: Geometry
    base_uri: str
    job: JobSettings
    ledger: Any = None

    def __call__(self, table: pa.Table) -> pa.Table:
        """Fetch the rows that are still pending."""
        use_storage(self.job)
        return map_rows(table, self._fetch_all)

    def _fetch_all(self, rows: list[Row]) -> None:
        # the threads below keep to the time limits, an image's and a mask's; the guard's is for what no thread survives
        guard = Guard("fetch", self.ledger, 3 * self.job.fetch_timeout, self.job.row_tries, fail)
        guard.run([row for row in rows if row["status"] == PENDING], self._fetch_pending)

    def _fetch_pending(self, pending: list[Row]) -> None:
        images: dict[str, list[Row]] = {}
        for row in pending:
            images.setdefault(row["image_uri"], []).append(row)
        self._settle(list(images.values()), self._fetch_image, "image_uri")
        # only now, since a mask must have its image's size
        drawn = [[row] for row in pending if row["status"] == PENDING and row["user_mask_uri"]]
        self._settle(drawn, self._fetch_mask, "user_mask_uri")

    def _settle(self, groups: Sequence[list[Row]], fetch: Callable[[list[Row]], list[Row]], column: str) -> None:
        """Give each group of rows what `fetch` finds for it, or each of its rows the same failure."""
        for rows, result in all_at_once(fetch, groups, self.job.fetch_threads, self.job.fetch_timeout):
            if not isinstance(result, Exception):
                for row, found in zip(rows, result, strict=True):
                    row.update(found)
                continue
            for row in rows:
                if isinstance(result, RowError):
                    fail(row, result)
                elif isinstance(result, FutureTimeout):
                    name = storage.shown(row[column])
                    fail(row, RowError(ErrorCode.TIMEOUT, f"{name} did not arrive within {self.job.fetch_timeout:g} s"))
                else:  # a bug or a library's surprise must stay these rows' own
                    fail(row, surprise(ErrorCode.FETCH_FAILED, row, result))

    def _allowed(self, uri: str) -> str:
        uri = storage.resolve(uri, self.base_uri)
        storage.refuse_scheme(uri, self.job.image_schemes)
        return uri

    def _fetch_image(self, rows: list[Row]) -> list[Row]:
        began = time.perf_counter()
        uri = self._allowed(rows[0]["image_uri"])
        data = storage.read_bytes(uri, max_bytes=self.job.max_bytes)
        pixels = decode_image(data, storage.shown(uri), max_pixels=self.job.max_pixels).pixels
        height, width = pixels.shape[:2]
        pixels = over_white(pixels)
        found: Row = {"_original": data, "width": width, "height": height}
        resolutions = {row["resolution"]: frame_of({**row, **found}, self.geometry) for row in rows}
        fitted = {resolution: fit(pixels, frame).tobytes() for resolution, frame in resolutions.items()}
        found["fetch_seconds"] = (time.perf_counter() - began) / len(rows)
        return [{**found, "_fitted": fitted[row["resolution"]]} for row in rows]

    def _fetch_mask(self, rows: list[Row]) -> list[Row]:
        (row,) = rows
        began = time.perf_counter()
        uri = self._allowed(row["user_mask_uri"])
        try:
            drawn = storage.read_bytes(uri, max_bytes=self.job.max_bytes)
        except RowError as error:
            if error.code not in records.PERMANENT:  # the mask may be good, and the row with it another time
                raise
            raise RowError(ErrorCode.BAD_MASK, error.message) from None
        size = (row["width"], row["height"])
        mask = decode_mask(drawn, storage.shown(uri), size, max_pixels=self.job.max_pixels)
        latent = latent_mask_from(mask, frame_of(row, self.geometry))
        seconds = row["fetch_seconds"] + time.perf_counter() - began
        return [{"_user_mask": encode_image(mask, "png"), "_latent_mask": latent.tobytes(), "fetch_seconds": seconds}]
