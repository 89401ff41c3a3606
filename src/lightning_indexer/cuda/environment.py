"""The environment variables that the CUDA implementation reads, and nothing else reads."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """Settings from outside.

    Args:
        cache_folder: LIGHTNING_INDEXER_CACHE, the folder of compiled kernels; it is made when needed.
            Default: the user's cache folder of this platform, `lightning-indexer` below it.
    """

    cache_folder: Path

    @staticmethod
    def read(variables: Mapping[str, str] = os.environ) -> "Environment":
        """Raise ValueError where a variable is set to something that cannot be meant."""
        folder = variables.get("LIGHTNING_INDEXER_CACHE")
        if folder is None:
            from platformdirs import user_cache_path

            return Environment(user_cache_path("lightning-indexer", appauthor=False))
        path = Path(folder).expanduser()
        if not path.is_absolute():
            raise ValueError(f"LIGHTNING_INDEXER_CACHE must be an absolute path, got {folder!r}")
        if path.exists() and not path.is_dir():
            raise ValueError(f"LIGHTNING_INDEXER_CACHE must be a folder, got the file {folder!r}")
        return Environment(path)
