"""Checkpoints of the Hugging Face Hub: `hf:OWNER/NAME` wherever a checkpoint folder is asked for.

Needs the package huggingface_hub (requirements-extra.txt) and a network. What is downloaded stays in out/hf/OWNER/NAME,
and is used without a network from then on.
"""

import os
import re

from common.errors import UserError

FOLDER = os.path.join("out", "hf")
# weights, shape and tokenizer; never code or pickles
FILES = ("model*.safetensors", "model.safetensors.index.json", "config.json", "tokenizer*.json", "tokenizer.model")
FILES += ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def local_folder(name):
    """The checkpoint folder that `name` stands for: itself, or the download of hf:OWNER/NAME or hf:OWNER/NAME@REVISION.
    UserError where that cannot be had."""
    if not name.startswith("hf:"):
        return name
    match = re.fullmatch(r"hf:([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", name)
    if not match:
        raise UserError(f"{name} names no model of the Hugging Face Hub; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name} needs huggingface_hub; pip install -r requirements-extra.txt") from None
    model, revision = match.groups()
    folder = os.path.join(FOLDER, model + (f"@{revision.replace('/', '-')}" if revision else ""))
    try:
        # patterns see whole paths, in which * also matches a slash
        snapshot_download(
            model, revision=revision, allow_patterns=list(FILES), ignore_patterns=["*/*"], local_dir=folder
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{name} could not be downloaded ({type(error).__name__}: {reason}); check the name and the network, or "
            "give the folder of a copy"
        ) from None
    return folder
