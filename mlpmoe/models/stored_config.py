"""The config of a checkpoint, without what it says of the machine that it was saved on."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig


def read_stored_config(folder: Path) -> PreTrainedConfig:
    """config.json in a folder, parsed. Which kernels compute attention and experts is left to this
    machine: a name in the file may be of a package that is not here, or of code that transformers
    would download and run. Raises as `AutoConfig.from_pretrained`."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    config._attn_implementation = None
    config._experts_implementation = None
    return config
