"""Models by their Hugging Face name: out of the hub's cache, GPT-2's own also from the network.

A name that is mistyped or a run that is not there looks like one, so nothing else is asked of the
network: `hf download ORG/NAME` puts any other model into the cache.
"""

from __future__ import annotations

import re
from pathlib import Path

GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
FILES = (
    *("config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
)


def find(name: str) -> Path | None:
    """The folder of a model in the hub's cache, None where there is none of that name.

    One of GPT-2's own that is not in the cache is downloaded (HF_HUB_OFFLINE=1 forbids it).

    Raises:
        ValueError: it is one of these, and can be neither found nor downloaded.
    """
    if not NAME.fullmatch(name):
        return None
    import huggingface_hub

    for cached_only in (True, False):
        if not cached_only and name not in GPT2:
            return None
        try:
            found = huggingface_hub.snapshot_download(
                name, allow_patterns=list(FILES), local_files_only=cached_only
            )
        except (OSError, ValueError) as error:
            cause = error
            continue
        folder = Path(found)
        weights = (*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin"))
        if (folder / "config.json").exists() and weights:  # else a tokenizer alone is cached
            return folder
        cause = ValueError(f"{folder} has no config.json, or no weights")
    raise ValueError(
        f"{name} is neither in the Hugging Face cache nor can it be downloaded; name a run or a "
        "GPT-2 folder"
    ) from cause
