"""Names of configuration keys: the most similar known key for an unknown one, and the file that sets a key."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

# Keys that other tools call by another name.
_ELSEWHERE = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "max_seq_length": "max_length",
    "name": "pretrained_model_name_or_path",
    "max_tokens": "max_new_tokens",
}
_SHOWN = 12  # known names that a message lists
_KEY = re.compile(r"([a-z_]+)(?:\.([A-Za-z0-9_]+))?(?=[=:. ]|$)")


def unknown(key: str, known: Iterable[str], group: str = "") -> str:
    """Return the message for an unknown key: "lora.rr: unknown key; did you mean lora.r?".

    Args:
        key: the unknown key, without its group.
        known: the keys that its group has.
        group: the group; "" for top-level keys.
    """
    names = sorted(known)
    prefix = f"{group}." if group else ""
    near = [_ELSEWHERE[key]] if _ELSEWHERE.get(key) in names else []
    near = near or ([name for name in names if name.startswith(key)] if len(key) > 3 else [])
    near = near or difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    near = near or ([name for name in names if key.lower() in name.lower()] if len(key) > 1 else [])
    if near:
        return f"{prefix}{key}: unknown key; did you mean {prefix}{near[0]}?"
    if len(names) <= _SHOWN:
        return f"{prefix}{key}: unknown key; the known keys are {', '.join(names)}"
    if not group:
        return f"{key}: unknown key; there are {', '.join(name for name in names if '.' not in name)} and every config key such as lora.r"
    return f"{prefix}{key}: unknown key; see conf/{group}/ for the usual ones"


def with_origin(message: str, overrides: Sequence[str], choices: Mapping[str, Any], folders: Sequence[Path]) -> str:
    """Return a message that begins with a configuration key, with the place where the key was set appended.

    Args:
        message: an error's text; if it begins with anything else, it is returned unchanged.
        overrides: of the command line, such as "lora.r=8".
        choices: the chosen option of each group, such as {"lora": "qkvo"}.
        folders: where configuration files are searched, in this order.
    """
    found = _KEY.match(message)
    if found is None:
        return message
    group, name = (found[1], found[2]) if found[2] else ("", found[1])
    if (group or name) not in choices and name != "seed":
        return message  # a command's own keys, such as run_dir, are set nowhere else
    if any(text.partition("=")[0].lstrip("+~") == found[0] for text in overrides):
        return f"{message} (set on the command line)"
    for place in _files(group, choices):
        for folder in folders:
            if (folder / place).is_file() and (setter := _setter(folder / place, group, name)) is not None:
                return f"{message} (set in conf/{setter.relative_to(folder)})"
    return message


def _files(group: str, choices: Mapping[str, Any]) -> list[str]:
    """Return the files that can set a key of a group, those that take precedence first."""
    experiment = choices.get("experiment")
    return [
        *([f"experiment/{experiment}.yaml"] if experiment else []),
        f"{group}/{choices.get(group)}.yaml" if group else "train.yaml",
    ]


def _setter(file: Path, group: str, name: str) -> Path | None:
    """Return the file that sets the key: this one, or a file in the same folder that it builds on."""
    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    values = (content.get(group) or {}) if file.parent.name == "experiment" and group else content
    if name in values:
        return file
    neighbours = [entry for entry in content.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    found = (_setter(file.with_name(f"{entry}.yaml"), group, name) for entry in neighbours)
    return next((path for path in found if path is not None), None)
