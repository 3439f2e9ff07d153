"""Where an adapter and its base are: directories here, repositories of the Hugging Face Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_dms.adapters import BASE_KEYS, CONFIG, CONFIGS, Adapter, is_adapter_dir, read_adapter


def base_of_adapter_alone(name: str, config: Mapping) -> str | None:
    """The base that must be served where ``name``, whose config.json this is, was given as the
    model: None for a whole checkpoint, whose config has a vocabulary."""
    if "vocab_size" in config or not any(key.startswith("dms_") for key in config):
        return None
    base = next((config[key] for key in BASE_KEYS if config.get(key)), None)
    if base is None:
        raise ValueError(
            f"{name} is an adapter that does not name its base. Serve the base model with "
            f"""--additional-config '{{"dms": {{"adapter": "{name}"}}}}', """
            f"or set {BASE_KEYS[0]} in the adapter's config.json."
        )
    beside = Path(name, base)
    return str(beside) if (beside / CONFIG).is_file() else base


def fetch_adapter(name: Any, revision: Any = None, cache_dir: Path | str | None = None) -> Path:
    """A local directory as it is; else a repository of the Hugging Face Hub, downloaded to its
    cache (default: huggingface_hub's own) or, offline, found there."""
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"adapter is {name!r}, but it must be a directory, or a repository of the Hugging Face "
            "Hub. Correct or remove the setting."
        )
    if revision is not None and not isinstance(revision, str):
        raise ValueError(
            f"adapter_revision is {revision!r}, but it must be a branch, a tag or a commit, as "
            "text. Correct or remove the setting."
        )
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(
                f"adapter_revision is {revision!r}, but adapter {name} is a directory here. Leave "
                "the revision out."
            )
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=["*.safetensors", *CONFIGS],
            )
        )
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"adapter {name!r} is no directory here, and as a repository of the Hugging Face Hub "
            f"it could not be fetched: {error} Correct the setting, or download it and give its "
            "directory."
        ) from error


def base_dir(adapter: Adapter) -> Path:
    """The local directory of the base that the adapter names, relative to its own or absolute."""
    if adapter.base is None:
        raise ValueError(
            f"adapter {adapter.path} does not name its base: give the base model as well, or set "
            f"{BASE_KEYS[0]} in its config.json."
        )
    for path in (adapter.path / adapter.base, Path(adapter.base)):
        if (path / CONFIG).is_file():
            return path
    raise ValueError(
        f"adapter {adapter.path} is trained over {adapter.base}, which is no directory here: give "
        "the directory of the base model as well."
    )


def weights_dir(path: Path, base: Path | None = None) -> Path:
    """The whole model's directory: `path` itself, or for an adapter `base` or what it names."""
    if is_adapter_dir(path):
        return base or base_dir(read_adapter(path))
    if base is not None:
        raise ValueError(f"--base {base} goes with an adapter, but {path} is none: leave it out.")
    return path
