"""What a servable model directory must hold."""

import json
from pathlib import Path

from tailrace.errors import CheckpointError

WEIGHTS_INDEX = "model.safetensors.index.json"


def check_model_directory(directory: Path) -> Path:
    """`directory` itself, if it can be served; CheckpointError names everything that is missing.

    Needed are config.json, tokenizer.json and weights: model.safetensors.index.json with every file it names, or else
    at least one *.safetensors.
    """
    missing = [name for name in ("config.json", "tokenizer.json") if not (directory / name).is_file()]
    missing += _missing_weights(directory)
    if missing:
        raise CheckpointError(f"model directory {directory} lacks {', '.join(missing)}")
    return directory


def _missing_weights(directory: Path) -> list[str]:
    index = directory / WEIGHTS_INDEX
    if index.is_file():
        return [name for name in indexed_files(index) if not (directory / name).is_file()]
    return [] if any(directory.glob("*.safetensors")) else ["*.safetensors"]


def indexed_files(index: Path) -> list[str]:
    """The weight files that a safetensors index names, sorted; CheckpointError when it cannot be read as one."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return sorted(names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a readable safetensors index: {error}") from error
