"""`trimtab list`, `pull` and `push`: steerings on the Hugging Face Hub, or in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trimtab.commands.model import JsonOption
from trimtab.commands.terminal import show, write_json
from trimtab.files.atomic_write import check_target


def list_(
    where: Annotated[
        str,
        typer.Argument(
            metavar="USER[/NAME]|FOLDER", help="A user on the Hub, or the beginning of repository names; or a folder."
        ),
    ],
    limit: Annotated[int, typer.Option(min=1, help="The maximum number.")] = 100,
    json: JsonOption = False,
) -> None:
    """List the steerings of a user on the Hub, or those in a folder.

    [bold]  trimtab list user
      trimtab list user/refusal
      trimtab list ./steerings --json[/bold]
    """
    from dataclasses import asdict

    from trimtab.files.hub import list_steerings

    listed = list_steerings(where, limit=limit)
    if json:
        write_json([asdict(each) for each in listed])
        return
    table = Table("steering", "model", "tags", "changed", box=None, pad_edge=False, header_style="dim")
    for column in table.columns:
        column.overflow = "fold"  # a name that is cut off can't be pulled
    for listing in listed:
        table.add_row(listing.name, ", ".join(listing.models), ", ".join(listing.tags), listing.modified or "")
    show(table if listed else f"no steerings found for {where}")


def pull(
    name: Annotated[str, typer.Argument(metavar="USER/NAME", help="A steering on the Hub.")],
    out: Annotated[
        Path | None, typer.Option(help="The .safetensors file to write; NAME.safetensors unless given.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit.", metavar="REVISION")] = None,
    file: Annotated[str | None, typer.Option(help="Another file of the repository, in any supported format.")] = None,
    json: JsonOption = False,
) -> None:
    """Download a steering from the Hub into a file.

    [bold]  trimtab pull user/refusal
      trimtab pull user/refusal --revision v2 --out refusal-2.safetensors
      trimtab pull user/vectors --file happy.gguf --out happy.safetensors[/bold]

    No code in the download is run. A file of another program is converted.
    """
    target = out or Path(f"{Path(name).name}.safetensors")
    check_target(target, ".safetensors")
    from trimtab.files.hub import FILE, from_pretrained
    from trimtab.files.steering_file import save_steering

    steering = from_pretrained(name, revision=revision, file=file or FILE)
    digest = save_steering(steering, target)
    if json:
        write_json({"name": name, "file": str(target), "digest": digest, "layers": list(steering.layers)})
        return
    show(f"saved {target}", f"look at it: trimtab inspect {target}")


def push(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A steering.")],
    name: Annotated[str, typer.Argument(metavar="USER/NAME", help="Its name on the Hub.")],
    base_model: Annotated[
        str | None, typer.Option(help="The model's id on the Hub, if the steering's card doesn't record it.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="The license of the data: apache-2.0, cc-by-4.0 …")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch to push to.")] = None,
    json: JsonOption = False,
) -> None:
    """Upload a steering to the Hub, with a page made from its card.

    [bold]  trimtab push refusal.safetensors user/refusal --license cc-by-4.0[/bold]

    The repository is created if it doesn't exist. Log in with `hf auth login`.
    """
    from trimtab.files.hub import push_to_hub
    from trimtab.files.load import load

    steering = load(file)
    address = push_to_hub(
        steering, name, base_model=base_model, license=license, private=private or None, revision=revision
    )
    if json:
        write_json({"file": str(file), "name": name, "commit": address})
        return
    show(f"pushed {file} to {name}: {address}")
