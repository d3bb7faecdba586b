"""Configurations, command lines and texts -> the same without credentials: refused where nothing needs one, masked where it only shows.

What a run was made with is stored, logged, and sent to trackers, so a password or an access token in a configuration would be copied to
all these places. Nothing here needs one there: libraries read theirs from the environment, and the judge's key is named by its variable.
A value that comes from the environment, `${oc.env:NAME}`, is used resolved and stored unresolved.
"""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from intern.config.build import plain
from intern.errors import UserError

MASK = "***"
_DEEPEST = 8  # references that lead to each other
_SHORTEST = 8  # characters of a variable's value that are worth masking
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_CREDENTIALS = re.compile("password|passwd|passphrase|secret|credential|apikey|bearer|authorization")
_SHORT_CREDENTIALS = {"pwd", "pw", "key", "auth"}  # as whole names
_KEYS = {"api", "access", "private", "secret", "account", "auth", "signing", "encryption", "license", "service"}
_PLACES = {"variable", "file", "path", "env", "name", "dir"}  # names of these name where a credential is
# Tokens of a vocabulary, not of an account: eos_token.
_VOCABULARY = (
    *("eos", "bos", "pad", "unk", "sep", "cls", "mask", "sos", "eot", "image", "video", "audio", "special", "stop"),
    *("embed", "max", "min", "per", "first", "last", "next", "word", "boi", "eoi", "think", "start", "end", "forced"),
)
_IN_QUERIES = re.compile("key|sig|code|auth|session|jwt|pass|cred|token|secret")  # in names of a URL's query
_TOKEN = re.compile(
    r"""(?<![A-Za-z0-9])(?:                          # an underscore may come before
      (?:hf|api_org)_[A-Za-z0-9]{16,}                # Hugging Face
    | sk-[\w-]*[A-Za-z0-9_]{16,}                     # OpenAI, Anthropic and others
    | wandb_v\d_\w{16,}                              # W&B; its older keys are forty hexadecimal digits
    | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_\w{20,} | glpat-[\w-]{16,}
    | (?:gsk|npm|r8)_[A-Za-z0-9]{20,} | nvapi-[\w-]{20,} | pypi-[\w-]{20,} | ya29\.[\w.-]{16,}
    | xox[abposr]-[\w-]{10,} | xapp-[\w-]{16,} | (?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9]) | AIza[\w-]{30,}
    | eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+             # JSON web tokens
    | (?:Bearer|Basic)\s+[\w+/=.-]{12,}
    | (?:[Pp]assword|[Pp]asswd|[Aa]pi[_ -]?key|AccountKey|SharedAccessKey)\s*[:=]\s*(?=\S*\d)[^\s'",;]{8,}  # in a text
    )
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----(?:[^-]+-----END\ [A-Z ]*PRIVATE\ KEY-----)?""",
    re.VERBOSE,
)
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_USER = re.compile(r"(://)(?:[^\s/@:?#]*:(?!\d+(?:[/?#]|$))\S*|[^\s/@:?#]+)@")
_QUERY = re.compile(r"([?&;#])([^=&;#\s]+)=([^&;#\s'\"]+)")
_NO_SCHEME = re.compile(r"^[^\s/@:]+:(?!//)[^\s@]+@")
_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?(\w+)")
_INNER_KEY = re.compile(r"([\w.-]+)['\"]?\s*[:=]\s*(?=[^\s,}])(?!null\b|None\b|''|\"\")")
# Paths and the prompt are stored as they were found; where quantized bases are cached is chosen by each command.
_STORED_ANYWAY = (
    *("model.pretrained_model_name_or_path", "model.quantized_cache"),
    *("data.train_file", "data.eval_file", "data.system_prompt"),
)
_FREE_TEXT = {"question", "context"}  # keys whose values are neither stored nor logged
_INSTEAD = {
    "judge.url": "put the key into an environment variable and name it with judge.key_variable",
    "trainer.hub_token": "nothing is uploaded by a training run; for a gated model, `hf auth login` or the variable HF_TOKEN",
}


def is_secret_name(name: str) -> bool:
    """Return whether a key or a variable of this name holds a credential.

    Args:
        name: such as hub_token, WANDB_API_KEY or apiKey; a dotted name counts by its last part.
    """
    name = name.rpartition(".")[2]
    words = [word.lower() for word in _WORD.findall(name)]
    whole = "".join(words)
    if not words or words[-1] in _PLACES or name == "PWD":  # the shell's working directory
        return False
    if _CREDENTIALS.search(whole) or whole in _SHORT_CREDENTIALS or "headers" in words or words[-1] == "cookie":
        return True
    if any(second == "key" and first in _KEYS for first, second in itertools.pairwise(words)):
        return True
    return whole.endswith("token") and not whole.removesuffix("token").endswith(_VOCABULARY)


def masked(text: str) -> str:
    """Return a text to be shown or stored with its credentials replaced by ***.

    Masked are access tokens of known forms, passwords and keys in URLs, and the values of this process's variables whose names say that
    they hold a credential.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and is_secret_name(name):
            text = text.replace(value, MASK)
    if "://" in text:
        text = _URL.sub(lambda found: _masked_url(found[0]), text)
    if "?" in text:  # addresses that are written without https://
        text = _QUERY.sub(_hidden, text)
    return _TOKEN.sub(MASK, text)


def _masked_url(url: str) -> str:
    return _QUERY.sub(_hidden, _USER.sub(rf"\1{MASK}@", url))


def _hidden(found: re.Match[str]) -> str:
    return f"{found[1]}{found[2]}={MASK}" if _hides(found[2]) else found[0]


def _hides(name: str) -> bool:
    return _IN_QUERIES.search(unquote(name).lower()) is not None


def refuse_arguments(arguments: Sequence[str]) -> None:
    """Refuse a command line that holds a credential, before anything is composed, stored or logged.

    Args:
        arguments: sys.argv without the program.

    Raises:
        UserError: names the key, never the value.
    """
    for argument in arguments:
        key, sign, value = argument.partition("=")
        key = key.lstrip("+~") if sign else ""
        if key in _FREE_TEXT:
            continue
        _refuse(key, value if sign else argument)
        if value.lstrip("'\"")[:1] in ("{", "["):
            for inner in _INNER_KEY.findall(value):
                if is_secret_name(inner):
                    raise UserError(_complaint(f"{key}.{inner}", "is a credential"))


def refuse(cfg: DictConfig) -> None:
    """Refuse a composed configuration that holds a credential, wherever it is from.

    Args:
        cfg: a configuration, with or without Hydra's own group.

    Raises:
        UserError: names the key, never the value.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    for key, value in _leaves(raw):
        if key in _FREE_TEXT:
            continue
        _refuse(key, value)
        if isinstance(value, str) and "${" in value:
            try:
                _refuse(key, OmegaConf.select(cfg, key))
            except OmegaConfBaseException:  # an expression that cannot be resolved: what reads the key reports it
                continue


def _refuse(key: str, value: Any) -> None:
    if value is None or isinstance(value, bool) or value in ("", "null", "None", "false", "true"):
        return
    is_text = isinstance(value, str)
    if is_secret_name(key) and (is_text or not key.startswith("lora.")):  # lora.rank_pattern has names of modules
        raise UserError(_complaint(key, "is a credential"))
    if not is_text:
        return
    for name in _VARIABLE.findall(value):
        if is_secret_name(name):
            raise UserError(_complaint(key, f"reads the credential in the variable {name}"))
    what = _credential_in(key, value)
    if what:
        raise UserError(_complaint(key, f"holds {what}"))


def _credential_in(key: str, text: str) -> str | None:
    """Return what credential a text holds, in words."""
    name = key.rpartition(".")[2]
    if _TOKEN.search(text) or (_WANDB_KEY.fullmatch(text.strip("'\"")) and name != "revision"):
        return "an access token"
    if any(_masked_url(url) != url for url in _URL.findall(text)):
        return "a password or key"
    if name.endswith(("url", "uri", "endpoint", "host")) and _NO_SCHEME.search(text.strip("'\"")):
        return "a password or key"
    return None


def _complaint(key: str, what: str) -> str:
    remedy = _INSTEAD.get(key, "leave it out; libraries read theirs from environment variables such as HF_TOKEN")
    return f"{key or 'the command line'}: {what}, which would be stored and logged: {remedy}"


def _leaves(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from ((place, inner) for _, inner in _leaves(value, place))
    else:
        yield place, node


# --- Values from the environment ---


def storable(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration as it is stored: resolved, except for texts that come from the environment.

    Numbers, true, false and null are stored by value: they are no credentials, and later commands compute with them.

    Raises:
        UserError: an expression that cannot be resolved.
    """
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    leaves = dict(_leaves(raw))

    def stored(one: Any, other: Any) -> Any:
        if isinstance(one, dict) and isinstance(other, dict):
            return {key: stored(one[key], value) for key, value in other.items()}
        if isinstance(one, list) and isinstance(other, list):
            return [stored(first, second) for first, second in zip(one, other, strict=True)]
        return one if isinstance(other, str) and _reads_environment(one, leaves) else other

    whole: dict[str, Any] = stored(raw, plain(cfg))
    return whole


def from_environment(cfg: DictConfig) -> dict[str, str]:
    """Return the expressions that `storable` leaves unresolved, by their keys."""
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    leaves = dict(_leaves(raw))
    kept = dict(_leaves(storable(cfg)))
    return {key: value for key, value in leaves.items() if _reads_environment(value, leaves) and kept[key] == value}


def check_environment(cfg: DictConfig) -> None:
    """Check that what later commands need to know of a run does not come from the environment, which is stored unresolved.

    Raises:
        UserError: a key that query, evaluate or compare would read.
    """
    for key in from_environment(cfg):
        if key.startswith(("model.", "quant.", "lora.", "data.")) and key not in _STORED_ANYWAY:
            raise UserError(
                f"{key}: comes from the environment, so its value is not stored, but asking the run needs it: let the shell fill it in, "
                f'as in "{key}=$VARIABLE"'
            )


def _reads_environment(value: Any, leaves: dict[str, Any], depth: int = 0) -> bool:
    """Return whether an expression reads a variable, itself or through a key that it refers to."""
    if not isinstance(value, str) or "${" not in value.replace("\\${", "") or depth > _DEEPEST:
        return False
    return "oc.env" in value or any(
        _reads_environment(leaves.get(name), leaves, depth + 1) for name in re.findall(r"\$\{([\w.]+)\}", value)
    )
