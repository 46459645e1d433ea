"""Steerings on the Hugging Face Hub: a repository has a steering file and a page generated from its card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import write_atomically
from trimtab.files.load import load
from trimtab.files.page import HUB_ID, LIBRARY, steering_page
from trimtab.files.steering_file import save_steering
from trimtab.keywords import keywords
from trimtab.steering import Steering
from trimtab.steering.steering import check_steering

FILE, PAGE = "steering.safetensors", "README.md"


@dataclass(frozen=True)
class SteeringListing:
    """A steering that can be loaded: its name (on the Hub) or path, the models it is for, and its other tags."""

    name: str
    models: tuple[str, ...]
    tags: tuple[str, ...]
    modified: str | None = None


def save_folder(
    steering: Steering,
    folder: str | Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> None:
    """Write a folder with a repository's content: `steering.safetensors` and a `README.md` generated from the card.

    See `push_to_hub` for the other arguments. Raises `TrimtabError` if the folder can't be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrimtabError(f"can't make the folder {folder}: {error.strerror}") from None
    page = steering_page(steering, name or folder.name, file=FILE, base_model=base_model, license=license)
    save_steering(steering, folder / FILE)
    write_atomically(folder / PAGE, page.encode())


@keywords
def push_to_hub(
    steering: Steering,
    repo: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a steering to the Hugging Face Hub, with a page generated from its card.

    Args:
        steering: The steering.
        repo: The repository, `user/name`. It is created if it doesn't exist.
        base_model: The Hub id of the model that it steers (default: the name of the card's model, if that is one).
        license: The license of the data that it was learned from, such as `cc-by-4.0`.
        private: Whether a repository that is created is private (default: the owner's setting on the Hub).
        revision: The branch (default: the main one).
        message: The message of the commit.
        token: The Hub's token (default: the one that the Hub's client has stored).

    Returns:
        The URL of the commit.

    Raises:
        TrimtabError: The name is invalid, the steering can't be saved, or the Hub refuses it.
    """
    check_steering(steering)
    _check_name(repo)
    with tempfile.TemporaryDirectory() as folder:
        save_folder(steering, folder, name=repo, base_model=base_model, license=license)
        with _hub(f"put a steering on the Hub as {repo}"):
            from huggingface_hub import HfApi

            api = HfApi(token=token)
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, commit_message=message or "A steering"
            )
    return str(done.commit_url)


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    file: str = FILE,
    token: str | None = None,
    **options: Any,
) -> Steering:
    """Load a steering from the Hugging Face Hub, or from a folder with the same content.

    Args:
        name: The repository, `user/name`, or the folder.
        revision: A branch, a tag or a commit of the repository (default: the main branch).
        file: The file in it, in any format that `load` reads.
        token: The Hub's token (default: the one that the Hub's client has stored).
        options: Keyword arguments of `load`, such as `layer_offset`.

    Returns:
        The steering.

    Raises:
        TrimtabError: It can't be downloaded, or a revision is given for a folder; and as `load` does.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise TrimtabError(f"{name} is a folder, which has no revisions; leave revision out")
        return load(Path(name) / file, **options)
    _check_name(str(name))
    with _hub(f"get {file} of {name} from the Hub"):
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(str(name), file, revision=revision, token=token)
    return load(path, **options)


def list_steerings(where: str | Path, *, limit: int | None = None, token: str | None = None) -> list[SteeringListing]:
    """The steerings of a user or an organization on the Hub (`user`, or `user/beginning-of-name`), or in a folder.

    In a folder, these are all `.safetensors` files of trimtab, at any depth. Raises `TrimtabError` if the Hub can't be
    reached.
    """
    if Path(where).is_dir():
        return list(_in_folder(Path(where)))[:limit]
    author, _, start = str(where).partition("/")
    if not re.fullmatch(r"[\w.-]+", author, re.ASCII) or "/" in start:
        raise TrimtabError(f"{where} is neither a folder nor a name on the Hub (user, or user/name)")
    with _hub(f"list the steerings of {author} on the Hub"):
        from huggingface_hub import HfApi

        listed = [_listed(info) for info in HfApi(token=token).list_models(author=author, filter=LIBRARY)]
    return [listing for listing in listed if listing.name.partition("/")[2].startswith(start)][:limit]


def _listed(info: Any) -> SteeringListing:
    tags = [str(tag) for tag in info.tags or ()]
    models = dict.fromkeys(tag.rpartition(":")[2] for tag in tags if tag.startswith("base_model:"))
    rest = tuple(tag for tag in tags if ":" not in tag and tag != LIBRARY)
    modified = getattr(info, "last_modified", None)
    return SteeringListing(str(info.id), tuple(models), rest, None if modified is None else modified.date().isoformat())


def _in_folder(folder: Path) -> Iterator[SteeringListing]:
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            steering = load(path, source="trimtab")
        except TrimtabError:
            continue  # a model's weights, say
        yield SteeringListing(str(path), tuple(model.name for model in steering.card.models), (steering.card.method,))


def _check_name(repo: str) -> None:
    if not HUB_ID.fullmatch(repo):
        raise TrimtabError(f"{repo!r} is neither a folder nor a name on the Hub (user/name)")


@contextmanager
def _hub(what: str) -> Iterator[None]:
    """Turn exceptions of the Hub's client into a `TrimtabError` that says what couldn't be done, and why."""
    try:
        yield
    except TrimtabError:
        raise
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and package not in ("huggingface_hub", "httpx", "httpx2"):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        raise TrimtabError(f"can't {what}: {reason[:300].rstrip('.')}") from error
