"""Names of configuration keys: the nearest right one for a wrong one, and the file that a value comes from."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

# What other tools call a key that has another name here.
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
    """What to say of a key that is not among the known ones: "lora.rr: unknown key; did you mean lora.r?"."""
    names = sorted(known)
    prefix = f"{group}." if group else ""
    near = [_ELSEWHERE[key]] if _ELSEWHERE.get(key) in names else difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if near:
        return f"{prefix}{key}: unknown key; did you mean {prefix}{near[0]}?"
    if len(names) <= _SHOWN:
        return f"{prefix}{key}: unknown key; known are {', '.join(names)}"
    return f"{prefix}{key}: unknown key; conf/{group}/ shows the usual ones"


def with_origin(message: str, overrides: Sequence[str], choices: Mapping[str, Any], folders: Sequence[Path]) -> str:
    """A message that begins with a configuration key, with the place where that key was set at its end.

    Args:
        message: an error's text; one that begins with something else stays as it is.
        overrides: what stands on the command line, such as "lora.r=8".
        choices: the option of each group, such as {"lora": "qkvo"}.
        folders: where configuration files are looked up, the first one first.
    """
    found = _KEY.match(message)
    if found is None:
        return message
    group, name = (found[1], found[2]) if found[2] else ("", found[1])
    if (group or name) not in choices and name != "seed":
        return message  # of a command's own keys, such as run_dir, there is no other place
    if any(text.partition("=")[0].lstrip("+~") == found[0] for text in overrides):
        return f"{message} (set on the command line)"
    for place in _files(group, choices):
        for folder in folders:
            if (folder / place).is_file() and (setter := _setter(folder / place, group, name)) is not None:
                return f"{message} (set in conf/{setter.relative_to(folder)})"
    return message


def _files(group: str, choices: Mapping[str, Any]) -> list[str]:
    """The files that can have set a key of a group, those that win first."""
    experiment = choices.get("experiment")
    return [
        *([f"experiment/{experiment}.yaml"] if experiment else []),
        f"{group}/{choices.get(group)}.yaml" if group else "train.yaml",
    ]


def _setter(file: Path, group: str, name: str) -> Path | None:
    """The configuration file that gives the key a value: this one, or a neighbour that it builds upon."""
    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    values = (content.get(group) or {}) if file.parent.name == "experiment" and group else content
    if name in values:
        return file
    neighbours = [entry for entry in content.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    found = (_setter(file.with_name(f"{entry}.yaml"), group, name) for entry in neighbours)
    return next((path for path in found if path is not None), None)
