"""The command line as a person types it -> as Hydra reads it; what cannot be read is refused with how to write it."""

import difflib
import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from intern.config.build import literal_text
from intern.errors import UserError
from intern.paths import CONF_DIR

# Keys of every command whose values are a person's words or paths.
WORDS = frozenset(
    {
        "against",
        "base_model",
        "base_name",
        "context",
        "data.chat_template",
        "data.eval_file",
        "data.system_prompt",
        "data.train_file",
        "eval_file",
        "generation.stop_strings",
        "harness.include_path",
        "history",
        "html",
        "hydra.run.dir",
        "hydra.sweep.dir",
        "lengths",
        "logger.name",
        "lora.exclude_modules",
        "lora.target_modules",
        "logger.project",
        "model.pretrained_model_name_or_path",
        "model.quantized_cache",
        "name",
        "notes",
        "out",
        "output_dir",
        "prove",
        "question",
        "resume",
        "run_dir",
        "train_file",
    }
)
_LISTS = {
    "data.eval_file",
    "data.train_file",
    "generation.stop_strings",
    "lora.exclude_modules",
    "lora.target_modules",
}  # may hold several: [a,b]
_SWEPT = (
    "data.",
    "model.",
    "logger.",
    "lora.",
)  # groups whose keys a sweep may give several values, separated by commas
_INTERPOLATED = {"hydra.run.dir", "hydra.sweep.dir", "model.quantized_cache"}  # ${now:...} is Hydra's in these
_NO_NAME = (int, float, type(None))  # values of an override that name no option
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
# Hydra's own options, by how many words follow them; {all}: Hydra takes a next word only if it is one of its choices.
_OPTIONS = {
    **dict.fromkeys(["--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"], 0),
    **dict.fromkeys(["--shell-completion", "-sc"], 0),
    **dict.fromkeys(["--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"], 1),
    **dict.fromkeys(["--config-dir", "-cd", "--experimental-rerun"], 1),
    **dict.fromkeys(["--info", "-i"], 0),
}
_INFO = {"all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}


def command_keys(config_name: str) -> set[str]:
    """Return the top-level keys and groups of a command: those of conf/<config_name>.yaml and of the files that it includes."""
    values = yaml.safe_load((CONF_DIR / f"{config_name}.yaml").read_text(encoding="utf-8"))
    keys = {str(key) for key in values} - {"defaults"} | {"hydra"}
    for default in values.get("defaults", ()):
        if isinstance(default, dict):
            keys |= {str(group).rpartition(" ")[2].partition("@")[0] for group in default}
        elif default != "_self_":
            keys |= command_keys(default)
    return {key for key in keys if "/" not in key}


def check_arguments(arguments: Sequence[str], words: Collection[str], keys: Collection[str]) -> None:
    """Refuse what Hydra would answer with its grammar or a traceback, with how to write it instead.

    Args:
        arguments: the command line as it was typed.
        words: the keys whose values are a person's words, as for `literal`.
        keys: the top-level keys and groups of the command.

    Raises:
        UserError: an option that Hydra does not have, a word that is no KEY=VALUE, a value that Hydra cannot read, several values without
            --multirun, a new top-level key.
    """
    read, position = literal(arguments, words), 0
    sweeps = bool({"-m", "--multirun"} & set(arguments))
    while position < len(arguments):
        argument, rest = arguments[position], arguments[position + 1 :]
        option, sign, _ = argument.partition("=")
        if option in _OPTIONS:
            takes_next = _OPTIONS[option] or (option in {"--info", "-i"} and bool(rest) and rest[0] in _INFO)
            position += int(takes_next and not sign)
        elif argument.startswith("-"):
            raise UserError(_no_option(argument, rest, keys))
        elif "=" not in argument and not argument.startswith("~"):
            raise UserError(_no_setting(argument, arguments[position - 1] if position else "", rest, keys))
        else:
            _check_value(argument, read[position], rest, sweeps)
            _check_key(argument, keys)
        position += 1


def _no_option(argument: str, rest: Sequence[str], keys: Collection[str]) -> str:
    """Return what to write instead of an option that does not exist."""
    option, sign, value = argument.partition("=")
    name = option.lstrip("-")
    value = value or "VALUE"
    if not sign and rest and not rest[0].startswith("-") and "=" not in rest[0]:
        value = rest[0]
    key = name if "." in name or name in keys else name.replace("-", "_")
    if key.partition(".")[0] in keys:
        return f"{argument}: settings have no dashes: {shlex.quote(f'{key}={value}')}"
    near = difflib.get_close_matches(option, [one for one in _OPTIONS if one.startswith("--")], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{argument}: no such option; {hint}settings have no dashes, as in name=VALUE; --help lists them"


def _no_setting(argument: str, before: str, rest: Sequence[str], keys: Collection[str]) -> str:
    """Return what to write instead of a word without an equals sign."""
    if "=" in before and not before.startswith("-"):
        whole = shlex.quote(f"{before} {argument}")
        return f"{argument}: is not KEY=VALUE; if it belongs to the word before it, quote both: {whole}"
    near = difflib.get_close_matches(argument, keys, n=1)
    if near or "." in argument:
        meant = argument if "." in argument else near[0]
        value = rest[0] if rest and "=" not in rest[0] else "VALUE"
        return f"{argument}: has no value; write {shlex.quote(f'{meant}={value}')}"
    name = argument if re.fullmatch(r"[\w.+-]+", argument) else "-"
    groups = [str(file.parent.relative_to(CONF_DIR)) for file in sorted(CONF_DIR.glob(f"*/{name}.yaml"))]
    return f"{argument}: is not KEY=VALUE" + (f"; did you mean {groups[0]}={argument}?" if groups else "")


def _check_value(argument: str, read: str, rest: Sequence[str], sweeps: bool) -> None:
    """Refuse a value that Hydra's grammar has no reading for, or several readings."""
    key, _, value = argument.partition("=")
    try:
        override = OverridesParser.create().parse_override(read)
    except HydraException:
        whole, following = argument, list(rest)
        while following and _is_open(whole):
            whole += f" {following.pop(0)}"
        if _is_open(whole):
            raise UserError(f"{argument}: a bracket is not closed") from None
        if whole != argument:
            raise UserError(
                f"{argument}: has spaces in its value, so quote it as a whole: {shlex.quote(whole)}"
            ) from None
        example = shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")
        raise UserError(f"{argument}: the value cannot be read; as a text it is written {example}") from None
    if override.is_sweep_override() and not sweeps:
        raise UserError(
            f"{argument}: gives several values; add --multirun for a run with each of them, or write a list as "
            f"{shlex.quote(f'{key}=[{value}]')}"
        )


def _is_open(text: str) -> bool:
    return any(text.count(opening) > text.count(closing) for opening, closing in ("[]", "{}", "()"))


def _check_key(argument: str, keys: Collection[str]) -> None:
    key = argument.partition("=")[0]
    top = key.lstrip("+~").partition("@")[0]
    if not top:
        raise UserError(f"{argument}: names no key; write KEY=VALUE")
    if key.startswith("+") and "." not in top and "/" not in top and top not in keys:
        near = difflib.get_close_matches(top, keys, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(sorted(keys))}"
        raise UserError(f"{argument}: nothing reads a key of this name; {hint}")


def literal(arguments: Sequence[str], words: Collection[str] = WORDS) -> list[str]:
    """Return a command line as Hydra reads it: values of `words` mean their characters, whatever those are to Hydra's grammar.

    Values that stay as they are: null, one text wholly in one pair of quotes (Hydra removes them), the list [a.jsonl,b.jsonl] for a key of
    several files, and in a sweep (--multirun) what has a comma, which separates the values of different jobs there.
    """
    sweeps = bool({"-m", "--multirun"} & set(arguments))
    return [_literal(argument, words, sweeps) for argument in arguments]


def _literal(argument: str, words: Collection[str], sweeps: bool) -> str:
    key, sign, value = argument.partition("=")
    name = key.lstrip("+")
    is_list = name in _LISTS and value.startswith("[") and value.endswith("]") and not Path(value).exists()
    is_swept = sweeps and "," in value and name.startswith(_SWEPT)
    if name not in words or not sign or value == "null" or is_list or is_swept or _QUOTED.fullmatch(value):
        return argument
    return f"{key}={_as_text(value, keep_interpolations=name in _INTERPOLATED)}"


def check_groups(arguments: Sequence[str]) -> None:
    """Raise UserError for a group that is given null or a number: Hydra would end with a traceback."""
    for argument in arguments:
        key, sign, value = argument.partition("=")
        group = key.lstrip("+").partition("@")[0]
        if not sign or not re.fullmatch(r"[a-z_]+(/[a-z_]+)?", group):
            continue
        options = sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))
        names = [yaml.safe_load(name) for name in value.split(",") if re.fullmatch(r"[\w.+-]*", name)]
        if options and any(isinstance(name, _NO_NAME) for name in names):
            raise UserError(f"{group}={value}: must name one of the options in conf/{group}/: {', '.join(options)}")


def quoted(key: str, value: str) -> str:
    """Return `key=value` as an override whose value is exactly these characters."""
    return f"{key}={_as_text(value)}"


def text_of(argument: str) -> str:
    """Return the value of `key=value`, without the quotes that Hydra would remove."""
    value = argument.partition("=")[2]
    if not _QUOTED.fullmatch(value):
        return value
    parsed = OverridesParser.create().parse_override(f"x={value}").value()
    text = parsed.text if isinstance(parsed, QuotedString) else str(parsed)
    return str(OmegaConf.create({"value": text}).value)


def _as_text(value: str, keep_interpolations: bool = False) -> str:
    if not keep_interpolations:
        value = literal_text(value)
    return QuotedString(value, Quote.double).with_quotes()
