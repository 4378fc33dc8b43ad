from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffedit_ray.dataset.manifest import (
    CONTRACT,
    MAX_TEXT,
    PlannedRow,
    RowPlanner,
    derived_seed,
    manifest_files,
    manifest_folder,
    manifest_schema,
    match_columns,
)
from diffedit_ray.dataset.spans import iterate_spans, read_span
from diffedit_ray.errors import ErrorCode, ManifestError
from diffedit_ray.settings import EditSettings

ROW = {"image_uri": "s3://b/horse.png", "reference": "a horse", "query": "a zebra"}


def _schema(*names: str, **typed: pa.DataType) -> pa.Schema:
    return pa.schema([*(pa.field(n, pa.string()) for n in names), *(pa.field(n, t) for n, t in typed.items())])


def _plan(
    row: Mapping[str, Any], settings: EditSettings | None = None, *, revision: str = "r1", image_format: str = "png"
) -> PlannedRow:
    columns = match_columns(_schema("image_uri", "query", *(set(row) - {"image_uri", "query"})), {}) if row else None
    assert columns is not None
    # the types of overriding columns do not matter to the planner, so they may all be called strings here
    return RowPlanner(columns, settings or EditSettings(), revision, image_format).plan(row)


class TestColumns:
    def test_every_column_of_the_contract_is_found_and_the_rest_is_carried(self) -> None:
        schema = _schema(*CONTRACT, shop=pa.int16(), tags=pa.list_(pa.string()))
        columns = match_columns(schema, {})
        assert columns.source == {name: name for name in CONTRACT}
        assert [(f.name, f.type) for f in columns.carried] == [("shop", pa.int16()), ("tags", pa.list_(pa.string()))]

    def test_a_rename_takes_the_named_column_and_carries_the_namesake(self) -> None:
        columns = match_columns(_schema("url", "caption", "query"), {"image_uri": "url", "query": "caption"})
        assert columns.source == {"image_uri": "url", "query": "caption"}
        assert [f.name for f in columns.carried] == ["query"]

    def test_two_columns_can_be_swapped(self) -> None:
        columns = match_columns(_schema("image_uri", "query"), {"image_uri": "query", "query": "image_uri"})
        assert columns.source == {"image_uri": "query", "query": "image_uri"}
        assert columns.carried == []

    def test_a_column_lent_to_another_no_longer_stands_for_its_own_name(self) -> None:
        with pytest.raises(ManifestError, match="no column 'query'"):
            match_columns(_schema("image_uri", "query"), {"reference": "query"})

    @pytest.mark.parametrize(
        ("renames", "message"),
        [
            ({"picture": "image_uri"}, r"--columns picture=image_uri: no such column in the contract; it knows image_"),
            ({"query": "caption"}, r"--columns query=caption: the manifest has no column 'caption'; it has image_uri,"),
        ],
    )
    def test_a_rename_that_cannot_be_is_refused(self, renames: dict[str, str], message: str) -> None:
        with pytest.raises(ManifestError, match=message):
            match_columns(_schema("image_uri", "query"), renames)

    def test_missing_columns_are_named_with_what_there_is_and_what_to_do(self) -> None:
        with pytest.raises(ManifestError) as caught:
            match_columns(_schema("url", "caption"), {})
        message = str(caught.value)
        assert "no column 'image_uri' and no 'query'; it has url, caption" in message
        assert "--columns image_uri=" in message

    @pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.null()])
    def test_any_kind_of_string_column_will_do(self, kind: pa.DataType) -> None:
        assert "reference" in match_columns(_schema("image_uri", "query", reference=kind), {}).source

    def test_texts_must_be_strings_but_an_id_may_be_a_number(self) -> None:
        assert match_columns(_schema("image_uri", "query", id=pa.int64()), {}).source["id"] == "id"
        with pytest.raises(ManifestError, match=r"column 'reference' \(reference\) must hold strings, not int64"):
            match_columns(_schema("image_uri", "query", reference=pa.int64()), {})


class TestPlanning:
    def test_a_plain_row(self) -> None:
        row = _plan(ROW)
        assert (row.image_uri, row.reference, row.query) == ("s3://b/horse.png", "a horse", "a zebra")
        assert row.error is None
        assert row.id == row.fingerprint
        assert not row.has_own_id
        assert row.seed == row.settings.seed == derived_seed("s3://b/horse.png")

    def test_the_derived_seed_is_of_the_image_alone(self) -> None:
        first, second = _plan(ROW), _plan({**ROW, "query": "a cow", "reference": None})
        assert first.seed == second.seed
        assert first.seed != _plan({**ROW, "image_uri": "s3://b/other.png"}).seed
        # a promise to users: the same manifest gives the same noise with every release
        assert derived_seed("horse.png") == 2774254753

    @pytest.mark.parametrize(
        "change",
        [
            {"image_uri": "s3://b/other.png"},
            {"query": "a cow"},
            {"reference": "a mule"},
            {"reference": None},
            {"mask_uri": "m.png"},
            {"seed": 1},
            {"steps": 20},
            {"composite": False},
        ],
    )
    def test_whatever_determines_the_result_is_in_the_fingerprint(self, change: dict[str, Any]) -> None:
        assert _plan({**ROW, **change}).fingerprint != _plan(ROW).fingerprint

    def test_so_are_the_settings_the_model_and_the_format(self) -> None:
        prints = {
            _plan(ROW).fingerprint,
            _plan(ROW, EditSettings(steps=49)).fingerprint,
            _plan(ROW, revision="r2").fingerprint,
            _plan(ROW, image_format="jpg").fingerprint,
        }
        assert len(prints) == 4

    def test_what_does_not_determine_the_result_is_not(self) -> None:
        plain = _plan(ROW).fingerprint
        assert _plan({**ROW, "shop": "7"}).fingerprint == plain
        assert _plan({**ROW, "id": "mine"}).fingerprint == plain
        assert _plan({**ROW, "steps": 50}).fingerprint == plain, "an override that says the default"
        assert _plan({**ROW, "reference": ""}).fingerprint == _plan({**ROW, "reference": None}).fingerprint

    def test_the_order_of_rows_does_not_matter(self) -> None:
        rows = [ROW, {**ROW, "query": "a cow"}, {**ROW, "image_uri": "x.png"}]
        assert [_plan(r).id for r in rows] == [_plan(r).id for r in reversed(rows)][::-1]

    def test_an_own_id_is_kept_beside_the_fingerprint(self) -> None:
        before, after = _plan({**ROW, "id": "horse-7"}), _plan({**ROW, "id": "horse-7", "query": "a cow"})
        assert before.id == after.id == "horse-7"
        assert before.has_own_id
        assert before.fingerprint != after.fingerprint

    def test_numeric_ids_become_text_and_missing_ones_are_derived(self) -> None:
        assert _plan({**ROW, "id": 12}).id == "12"
        for absent in (None, ""):
            row = _plan({**ROW, "id": absent})
            assert row.id == row.fingerprint

    @pytest.mark.parametrize("bad", ["a/b", "..", ".hidden", "a\\b", "a\0b", "a\nb", "x" * 201, "é" * 101])
    def test_an_id_that_cannot_name_a_file_fails_its_row(self, bad: str) -> None:
        row = _plan({**ROW, "id": bad})
        assert row.error is not None
        assert row.error.code is ErrorCode.BAD_ROW
        assert "cannot name a file" in row.error.message

    @pytest.mark.parametrize("good", ["a", "SKU-00_1.v2", "name@shop=3 b", "été", "x" * 200])
    def test_ids_that_can(self, good: str) -> None:
        assert _plan({**ROW, "id": good}).error is None


PINNED: list[dict[str, Any]] = [
    ROW,
    {"image_uri": 'été/ü "x".png', "reference": None, "query": "a \u2028 zebra \U0001f993\n\\"},
    {**ROW, "reference": "", "mask_uri": "m.png", "id": "mine"},
    {"image_uri": "s3://b/horse.png", "query": "a zebra", "seed": 7},
    {**ROW, "reference": None, "seed": 2**63 - 1, "steps": 20.0, "composite": False, "resolution": 512},
    {**ROW, "reference": None, "guidance_scale": 3, "mask_threshold": 0.45},
    {**ROW, "reference": None, "steps": 0},
    {**ROW, "reference": None, "seed": -1},
    {**ROW, "reference": None, "seed": 5.0, "id": 12},
    {**ROW, "reference": None, "query": "", "steps": 20},
    {"image_uri": None, "query": None},
]
FINGERPRINTS = [
    "ceb7090643f17334e559c918c3f84a89 5a0432a88c1e90fc773e5e9706d7e50d 8a743a41ff5bb64975854260e1a0f1e2 "
    "21ff55e6b7ecb8fe7757ea3e28de4027 7ea8f6919e41476a7ef6013a4a4518f1 0ae4c5666cc42b24df3667bf2d8162b4 "
    "5300a60c8078e99b9ad48767039687dc 061ca511806c6813e8946505be763400 0b323b75d44c0e94ca509761fc911385 "
    "22e750700b93eecc6cff362ea5e78113 8b3ac372e1c4c167314683f99bfbcf30",
    "2e1073a75a1d0f3519f2ebddbb024da5 638d14a236a58f28a4170afe7a110001 234facf34b26ab66031c6c0d4b71e697 "
    "3eeda128deaa3ea9d8a6ca61066378aa d7c5bb36abb04bb22744300f862305ea d2235f3936925f1a70a2a29d6e68c849 "
    "d92360845b4330a377bc4f403a494158 35361d28cbe59f6a1702dd3d6d8cb08f 3a62de71f4bc540cb5c442d2e82924ae "
    "4ab0b8a9f9e17f02045d0d206862a0d2 9cf3c2729d13198ca7396a534a65de64",
]
"""Of the rows above, as version 0.1.0 first wrote them: another value edits every row of every output again."""


class TestFingerprintsStay:
    @pytest.mark.parametrize(
        ("settings", "revision", "image_format", "expected"),
        [
            (EditSettings(mask_clip=0.98), "r1", "png", FINGERPRINTS[0]),
            (
                EditSettings(steps=20, seed=3, guidance_scale=5, mask_clip=0.98),
                "0123456789abcdef",
                "webp",
                FINGERPRINTS[1],
            ),
        ],
    )
    def test_from_one_release_to_the_next(
        self, settings: EditSettings, revision: str, image_format: str, expected: str
    ) -> None:
        found = [_plan(row, settings, revision=revision, image_format=image_format) for row in PINNED]
        assert [row.fingerprint for row in found] == expected.split()

    def test_a_setting_that_came_later_counts_where_it_is_used(self) -> None:
        row = {"image_uri": "a.png", "query": "a cat"}
        ddim, dpm = (_plan(row, EditSettings(solver=solver)) for solver in ("ddim", "dpm++"))  # type: ignore[arg-type]
        asked = _plan({**row, "solver": "dpm++"}, EditSettings())
        assert ddim.fingerprint == _plan(row, EditSettings()).fingerprint
        assert ddim.fingerprint != dpm.fingerprint == asked.fingerprint
        assert asked.settings.solver == "dpm++"
        assert _plan({**row, "solver": "euler"}, EditSettings()).error is not None

    def test_identifying_a_table_gives_what_planning_gives(self) -> None:
        rows = [{k: v for k, v in row.items() if k not in ("id", "seed", "steps")} for row in PINNED]
        rows += [{**ROW, "id": "mine", "steps": 20.0, "seed": 5}, {**ROW, "id": "", "steps": math.nan}]
        rows += [{**ROW, "steps": 0.0}, {**ROW, "seed": 5}]
        table = pa.table({name: [row.get(name) for row in rows] for name in {n: None for row in rows for n in row}})
        planner = RowPlanner(match_columns(table.schema, {}), EditSettings(), "r1", "png")
        planned = [planner.plan(row) for row in table.to_pylist()]
        assert planner.identify(table) == ([p.id for p in planned], [p.fingerprint for p in planned])
        assert {p.error.code for p in planned if p.error} == {ErrorCode.BAD_ROW, ErrorCode.BAD_SETTINGS}

    def test_a_combination_of_settings_met_before_is_told_apart_from_its_likes(self) -> None:
        # True equals 1 and 20 equals 20.0 to a dictionary, and settings are remembered in one
        columns = match_columns(_schema("image_uri", "query", "steps", "composite", "guidance_scale"), {})
        planner = RowPlanner(columns, EditSettings(), "r1", "png")
        rows = [{**ROW, "guidance_scale": 1, "composite": v} for v in (1, True, 1.0)]
        assert [planner.plan(row).settings.composite for row in rows] == [True] * 3
        for value in ([5], 5, "5", 5):
            row = planner.plan({**ROW, "steps": value})
            assert (row.error is None) == (value != [5])
            assert row.settings.steps == (50 if value == [5] else 5)


class TestOverrides:
    def test_a_rows_own_settings_hold_for_it(self) -> None:
        row = _plan({**ROW, "steps": 20, "seed": 5, "composite": False, "guidance_scale": 3}, EditSettings(mask_maps=4))
        s = row.settings
        assert (s.steps, s.seed, s.composite, s.guidance_scale, s.mask_maps) == (20, 5, False, 3.0, 4)
        assert row.seed == 5

    @pytest.mark.parametrize("absent", [None, math.nan])
    def test_null_and_nan_override_nothing(self, absent: float | None) -> None:
        row = _plan({**ROW, "steps": absent, "seed": absent, "guidance_scale": absent})
        assert row.error is None
        assert row.fingerprint == _plan(ROW).fingerprint

    def test_whole_floats_are_integers(self) -> None:
        # what pandas makes of an integer column with gaps
        row = _plan({**ROW, "steps": 20.0, "resolution": 512.0, "seed": 7.0})
        assert row.fingerprint == _plan({**ROW, "steps": 20, "resolution": 512, "seed": 7}).fingerprint

    @pytest.mark.parametrize(
        ("field", "value"), [("steps", 0), ("encoding_ratio", 1.5), ("steps", "many"), ("guidance_scale", math.inf)]
    )
    def test_a_bad_value_fails_its_row_and_says_which(self, field: str, value: object) -> None:
        row = _plan({**ROW, field: value})
        assert row.error is not None
        assert row.error.code is ErrorCode.BAD_SETTINGS
        assert row.error.message.startswith(f"{field}: ")

    def test_rows_that_differ_in_their_bad_values_stay_apart(self) -> None:
        # or mending one into the other would look like no change
        assert _plan({**ROW, "steps": 0}).fingerprint != _plan({**ROW, "steps": -1}).fingerprint
        assert _plan({**ROW, "steps": 0}).fingerprint != _plan(ROW).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"query": None},
        {"query": ""},
        {"query": "  \n"},
        {"image_uri": None},
        {"image_uri": ""},
        {"query": "x" * (MAX_TEXT + 1)},
        {"reference": "x" * (MAX_TEXT + 1)},
        {"image_uri": "a\0.png"},
    ],
)
def test_a_row_without_usable_texts_is_a_bad_row(change: dict[str, Any]) -> None:
    row = _plan({**ROW, **change})
    assert row.error is not None
    assert row.error.code is ErrorCode.BAD_ROW
    assert 0 <= row.seed < 2**63, "a failed row has a record, and a record has a seed"


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for i, name in enumerate(["b.parquet", "a.parquet", "deep/c.parquet"]):
            file = tmp_path / "m" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"image_uri": [f"{i}.png"], "query": ["q"]}), file)
        (tmp_path / "m" / "_SUCCESS").touch()
        (tmp_path / "m" / ".crc.parquet").write_bytes(b"not one")
        return tmp_path / "m"

    def test_one_file(self, folder: Path) -> None:
        assert manifest_files(str(folder / "a.parquet")) == [str(folder / "a.parquet")]
        assert manifest_folder(str(folder / "a.parquet")) == str(folder)

    def test_a_file_of_another_name(self, folder: Path) -> None:
        file = (folder / "a.parquet").rename(folder / "a.pq")
        assert manifest_files(str(file)) == [str(file)]
        assert manifest_folder(str(file)) == str(folder)

    def test_a_folder_is_all_parquet_files_below_it_in_order(self, folder: Path) -> None:
        expected = [str(folder / name) for name in ("a.parquet", "b.parquet", "deep/c.parquet")]
        assert manifest_files(str(folder)) == expected
        assert manifest_files(f"{folder}/") == expected
        assert manifest_folder(f"{folder}/") == str(folder)

    def test_a_folder_may_be_called_like_a_file(self, folder: Path) -> None:
        # what Spark and Ray write
        folder = folder.rename(folder.with_name("m.parquet"))
        assert len(manifest_files(str(folder))) == 3
        assert manifest_folder(str(folder)) == str(folder)

    def test_a_glob(self, folder: Path) -> None:
        assert manifest_files(f"{folder}/[ab].parquet") == [str(folder / "a.parquet"), str(folder / "b.parquet")]
        assert manifest_folder(f"{folder}/[ab].parquet") == str(folder)
        assert manifest_folder(f"{folder}/*/c.parquet") == str(folder)

    def test_a_uri_keeps_its_scheme(self, folder: Path) -> None:
        assert manifest_files(f"file://{folder}/a.parquet") == [f"file://{folder}/a.parquet"]

    @pytest.mark.parametrize("name", ["none.parquet", "empty", "*.csv"])
    def test_nothing_there(self, folder: Path, name: str) -> None:
        (folder / "empty").mkdir()
        with pytest.raises(ManifestError, match="no manifest at"):
            manifest_files(f"{folder}/{name}")

    def test_an_unknown_scheme(self) -> None:
        with pytest.raises(ManifestError, match="nowhere://"):
            manifest_files("nowhere://bucket/m.parquet")

    def test_rows_come_in_file_order_and_in_bounded_tables(self, folder: Path) -> None:
        many = pa.table({"image_uri": [f"{i}" for i in range(25)], "query": ["q"] * 25})
        pq.write_table(many, folder / "b.parquet")
        found = list(iterate_spans(manifest_files(str(folder)), ["image_uri"], 10))
        spans, tables = [span for span, _ in found], [table for _, table in found]
        assert [len(t) for t in tables] == [span.rows for span in spans] == [1, 10, 10, 5, 1]
        assert [span.start for span in spans] == [0, 1, 11, 21, 26]
        assert [uri for t in tables for uri in t["image_uri"].to_pylist()] == [
            "1.png",
            *many["image_uri"].to_pylist(),
            "2.png",
        ]
        assert all(t.column_names == ["image_uri"] for t in tables)

    def test_a_span_is_read_again_with_all_its_columns(self, folder: Path) -> None:
        many = pa.table({"image_uri": [f"{i}" for i in range(25)], "query": ["q"] * 25, "sku": range(25)})
        pq.write_table(many, folder / "b.parquet", row_group_size=12)
        files = manifest_files(str(folder))
        schema = manifest_schema(files)
        spans = [span for span, _ in iterate_spans(files, ["query"], 5)]
        assert [span.rows for span in spans] == [1, 5, 5, 2, 5, 5, 2, 1, 1]
        read = pa.concat_tables([read_span(span, schema) for span in spans])
        assert read.schema.equals(schema)
        assert read["image_uri"].to_pylist() == ["1.png", *many["image_uri"].to_pylist(), "2.png"]
        assert read["sku"].to_pylist() == [None, *range(25), None]

    def test_a_file_that_shrank_meanwhile(self, folder: Path) -> None:
        spans = [span for span, _ in iterate_spans(manifest_files(str(folder)), ["query"])]
        schema = manifest_schema(manifest_files(str(folder)))
        pq.write_table(
            pa.table({"image_uri": pa.array([], pa.string()), "query": pa.array([], pa.string())}), folder / "b.parquet"
        )
        with pytest.raises(ManifestError, match=r"b\.parquet has changed while the run was reading it"):
            read_span(spans[1], schema)

    def test_a_file_that_is_not_parquet(self, folder: Path) -> None:
        (folder / "b.parquet").write_text("image_uri,query\n")
        files = manifest_files(str(folder))
        with pytest.raises(ManifestError, match=r"b\.parquet cannot be read as Parquet"):
            manifest_schema(files)
        with pytest.raises(ManifestError, match=r"b\.parquet cannot be read as Parquet"):
            list(iterate_spans(files, None))

    def test_files_may_lack_columns_but_not_disagree_about_one(self, folder: Path) -> None:
        # a manifest that grows gains columns
        pq.write_table(pa.table({"image_uri": ["x"], "query": ["q"], "seed": [1]}), folder / "b.parquet")
        assert manifest_schema(manifest_files(str(folder))).names == ["image_uri", "query", "seed"]
        pq.write_table(pa.table({"image_uri": ["x"], "query": ["q"], "seed": ["one"]}), folder / "deep" / "c.parquet")
        with pytest.raises(ManifestError, match="different columns"):
            manifest_schema(manifest_files(str(folder)))
