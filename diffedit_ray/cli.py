"""The command line: parses, calls, prints, exits."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffedit_ray.errors import DiffEditError, ManifestError, ModelError, SettingsError, WrongOutputError
from diffedit_ray.settings import EditSettings, JobSettings, explain

app = typer.Typer(
    name="diffedit-ray",
    help="Edit images in bulk: a manifest of (image, reference, query) in, edited images, masks and records out.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_console = Console()

SHOWN_FAILURES = 50

_UsageError: Any = typer.BadParameter.__mro__[1]  # some releases of typer use click, others bring a copy of it


def _option(name: str, info: FieldInfo) -> inspect.Parameter:
    """The command-line option of a settings field: same name, description and default."""
    flag = "--" + name.replace("_", "-")
    kind: Any = info.annotation
    help_text = info.description or ""
    if name in _PARSERS:
        kind, metavar, default = list[str] | None, _PARSERS[name][0], None
    else:
        metavar, default = None, info.default
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}" if info.default else flag
    if get_origin(kind) is not Literal and get_args(kind) and list[str] not in get_args(kind):
        kind = next(k for k in get_args(kind) if k is not type(None)) | None
    annotation = Annotated[kind, typer.Option(flag, help=help_text, metavar=metavar)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every field of both settings as an option; it receives them built, as `settings` and `job`."""
    own = [
        p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name not in ("settings", "job")
    ]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    models: tuple[type[BaseModel], ...] = (EditSettings, JobSettings)
    fields = [(m, name, info) for m in models for name, info in m.model_fields.items()]

    def wrapper(**given: Any) -> None:
        for name, (_, parse) in _PARSERS.items():
            if given[name] is None:
                del given[name]
            else:
                given[name] = parse(given[name])
        try:
            built = [m(**{n: given.pop(n) for model, n, _ in fields if model is m and n in given}) for m in models]
        except ValidationError as error:
            raise SettingsError(explain(error)) from None
        command(**given, settings=built[0], job=built[1])

    wrapper.__doc__ = command.__doc__
    wrapper.__name__ = command.__name__
    wrapper.__signature__ = inspect.Signature(own + [_option(n, i) for _, n, i in fields])  # type: ignore[attr-defined]
    return wrapper


def _parse_columns(given: Sequence[str]) -> dict[str, str]:
    columns = {}
    for part in ",".join(given).split(","):
        name, equals, own = part.partition("=")
        if not (name and equals and own):
            raise SettingsError(f"--columns takes NAME=COLUMN, as in image_uri=url,query=caption; not {part!r}")
        columns[name.strip()] = own.strip()
    return columns


def _parse_schemes(given: Sequence[str]) -> list[str]:
    return [scheme for part in given for scheme in part.split(",") if scheme.strip()]


def _parse_storage_options(given: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in given:
        source = "--storage-options"
        if not text.lstrip().startswith("{"):
            source = f"--storage-options {text}"
            try:
                with open(os.path.expanduser(text), encoding="utf-8") as file:
                    text = file.read()
            except (OSError, UnicodeDecodeError) as error:
                # whatever it is, it may have been meant as the options themselves
                reason = getattr(error, "strerror", None) or "not a text file"
                raise SettingsError(
                    f"--storage-options takes JSON, starting with {{, or the path of a JSON file: {reason}"
                ) from None
        try:
            read = json.loads(text)
        except json.JSONDecodeError as error:
            raise SettingsError(f"{source}: not JSON: {error.msg} at character {error.pos + 1}") from None
        if not isinstance(read, dict):
            raise SettingsError(f'{source}: must be an object of protocols, such as {{"s3": {{…}}}}')
        options.update(read)
    return options


_PARSERS: dict[str, tuple[str, Callable[[Sequence[str]], Any]]] = {
    "columns": ("NAME=COLUMN[,…]", _parse_columns),
    "image_schemes": ("SCHEME[,…]", _parse_schemes),
    "storage_options": ("JSON|FILE", _parse_storage_options),
}
"""Settings that are no single value: how their option is shown, and read from all it was given."""


@app.command()
@_with_settings
def edit(
    manifest: Annotated[str, typer.Argument(help="A Parquet file, a folder of them, or a glob.", show_default=False)],
    output: Annotated[str, typer.Argument(help="Where images, masks and records go.", show_default=False)],
    model: Annotated[str, typer.Option("--model", help="Checkpoint folder, hub id, or demo for the embedded one.")],
    settings: EditSettings,
    job: JobSettings,
) -> None:
    """Edit every row of MANIFEST that OUTPUT has no record of yet.

    Run the same command again to carry on after a stop, or after the manifest has grown.
    """
    _run(manifest, output, model, settings, job)


@app.command()
@_with_settings
def demo(
    settings: EditSettings,
    job: JobSettings,
    output: Annotated[str, typer.Argument(help="Where images, masks and records go.")] = "diffedit-demo",
) -> None:
    """Run the shipped manifest on the embedded model: the same code as edit, in about a minute."""
    from diffedit_ray.demo import demo_manifest

    _run(str(demo_manifest()), output, "demo", settings, job, sheet=True)


_Output = Annotated[str, typer.Argument(help="The output of a run, going on or ended.", show_default=False)]


@app.command()
def status(
    output: _Output,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
) -> None:
    """Say how far the run at OUTPUT has come, or how it ended, and what has failed."""
    from diffedit_ray.dataset.status import status as read_status

    found = read_status(output)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    _console.print(f"{found.state}: {found.output}", highlight=False, markup=False, soft_wrap=True)
    table = Table("")
    table.add_column("rows", justify="right")
    table.add_column("")
    for name in ("edited", "unchanged", "failed"):
        table.add_row(name, str(getattr(found, name)), "")
    for reason in found.errors:
        table.add_row(f"  {reason.code}", str(reason.count), escape(reason.example))
    table.add_row("pending", _known(found.pending), "")
    table.add_row("in the manifest", _known(found.rows), "")
    _console.print(table)
    lines = {
        "rate": None if found.rate is None else f"{found.rate:.3g} rows/s",
        "time left": None if found.eta_seconds is None else str(timedelta(seconds=round(found.eta_seconds))),
        "run by": found.runner,
        "started": found.started_at,
        "ended": found.ended_at,
        "reason": found.error,
    }
    for name, line in lines.items():
        if line is not None:
            _console.print(f"{name}: {line}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def failures(
    output: _Output,
    code: Annotated[str | None, typer.Option("--code", help="Only failures with this error code.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of them, one JSON object a line.")] = False,
) -> None:
    """List the rows of OUTPUT that have failed, and why."""
    from diffedit_ray.dataset.status import failures as read_failures

    found = read_failures(output, code)
    if as_json:
        for row in found.to_pylist():
            print(json.dumps(row, default=str))
        return
    table = Table("code", "image", "query", "tries", "message", title=f"{len(found)} failed rows", title_justify="left")
    for row in found.slice(0, SHOWN_FAILURES).to_pylist():
        shown = (row["error_code"], row["image_uri"], row["query"], row["attempts"], row["error_message"])
        table.add_row(*(escape("" if value is None else str(value)) for value in shown))
    _console.print(table)
    if len(found) > SHOWN_FAILURES:
        _console.print(f"and {len(found) - SHOWN_FAILURES} more: --json prints all of them", highlight=False)


def _known(count: int | None) -> str:
    return "not known" if count is None else str(count)


def _run(
    manifest: str, output: str, model: str, settings: EditSettings, job: JobSettings, *, sheet: bool = False
) -> None:
    from diffedit_ray.demo import demo_model
    from diffedit_ray.pipeline.job import run_edit_job
    from diffedit_ray.pipeline.progress import JobProgress

    with JobProgress(_console) as progress:
        summary = run_edit_job(
            manifest,
            output,
            model=str(demo_model()) if model == "demo" else model,
            settings=settings,
            job=job,
            progress=progress.update,
        )
    if not summary.edited_now and not summary.interrupted:
        _console.print(f"nothing to do: all {summary.rows} rows are recorded in {output}", highlight=False)
    table = Table(title=f"{summary.rows} rows in {summary.seconds:.1f} s", title_justify="left")
    table.add_column("status")
    table.add_column("rows", justify="right")
    for status in ("edited", "unchanged", "failed"):
        table.add_row(status, str(getattr(summary, status)))
    for code, count in summary.errors.items():
        table.add_row(f"  {code}", str(count))
    if summary.done_before:
        table.add_row("recorded before", str(summary.done_before))
    _console.print(table)
    if sheet and summary.edited:
        from diffedit_ray.gallery.contact_sheet import contact_sheet

        path = os.path.join(output, "contact_sheet.png")
        contact_sheet(output, path)
        _console.print(f"before · mask · after: {path}", highlight=False, soft_wrap=True)
    _console.print(f"images, masks and records: {output}", highlight=False, soft_wrap=True)
    if summary.exit_code:
        raise typer.Exit(summary.exit_code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (see the README)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        result = app(args=given or ["--help"], standalone_mode=False)
        if not given:
            return 2
        return result if isinstance(result, int) else 0
    except _UsageError as error:
        print(f"diffedit-ray: {error.format_message()} (see --help)", file=sys.stderr)
        return 2
    except (SettingsError, ManifestError, ModelError, WrongOutputError) as error:
        print(f"diffedit-ray: {error}", file=sys.stderr)
        return 2
    except DiffEditError as error:
        print(f"diffedit-ray: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        print("diffedit-ray: interrupted; run the same command to carry on", file=sys.stderr)
        return 130


def entry() -> None:
    """The console script."""
    sys.exit(main())
