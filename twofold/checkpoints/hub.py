"""A model from the Hugging Face hub, by way of `huggingface_hub` and its cache. Only what is read is downloaded."""

import errno
import re
import sys
from pathlib import Path

from twofold.bounded import shown
from twofold.errors import TwofoldError

NAME = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ["*.safetensors", "*.json", "*.jinja"]
UNWANTED = ["*/*", "consolidated*", "onnx*"]  # other formats of the same weights; never a pickle


def download(name: str) -> Path:
    """The folder of hub model ``org/name``. Raises ``TwofoldError`` if there is none, it is closed, or no network."""
    import huggingface_hub
    from huggingface_hub import errors, utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except errors.GatedRepoError:
        raise TwofoldError(
            f"{name}: its owner asks you to accept terms first: do so on the model's page, then run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise TwofoldError(f"{name}: no such model on the hub, or a private one (`hf auth login`)") from None
    except errors.HFValidationError as error:
        raise TwofoldError(f"{shown(name)}: not a name that the hub takes ({shown(error)})") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise TwofoldError(f"{name}: not in the hub's cache, and the hub cannot be reached (no network?)") from None
    except errors.HfHubHTTPError as error:
        raise TwofoldError(f"{name}: the hub refuses ({shown(error)})") from None
    except Exception as error:  # the network's and the disk's, of whichever library the hub's own is built on
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TwofoldError(f"{name}: the disk is full; what was fetched so far is kept for the next call") from None
        raise TwofoldError(f"{name}: cannot be fetched ({shown(error)})") from None


def cached_models() -> list[tuple[str, Path]]:
    """(name, folder) of the models in the hub's cache, the revision used last of each."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return []
    models = [repo for repo in repos if repo.repo_type == "model" and repo.revisions]
    latest = [(repo.repo_id, max(repo.revisions, key=lambda revision: revision.last_modified)) for repo in models]
    return sorted((name, Path(revision.snapshot_path)) for name, revision in latest)
