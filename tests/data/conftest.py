"""What the tests of data share: a cache of their own, the tiny base's tokenizer, rows through the real path."""

import datasets
import pytest
from omegaconf import OmegaConf

from intern.data.prepare import located, prepare
from intern.data.prompt import Prompt
from intern.data.settings import DataConfig
from intern.model.base import Base


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer():
    return Base(OmegaConf.create({"pretrained_model_name_or_path": "data/tiny_llama3"})).tokenizer()


@pytest.fixture
def prepared(tokenizer):
    """Runs the path that training runs: settings -> checked, tokenized rows."""

    def run(*files, max_length=512, **values):
        names = [str(file) for file in files]
        known = {"train_file": names[0] if len(names) == 1 else names, "eval_file": "auto", "context": "never"}
        found = located(DataConfig(**(known | {"num_proc": 1, "system_prompt": "auto"} | values)))
        prompt = Prompt.from_tokenizer(tokenizer, found.data.system_prompt, found.data.context)
        return prepare(found, tokenizer, prompt, max_length)

    return run


@pytest.fixture
def shown(tokenizer):
    """A tokenized row as (everything that the model reads, what it learns)."""

    def show(prepared, row=0):
        one = prepared.train_tokens.rows[row]
        learned = [token for token, label in zip(one["input_ids"], one["labels"], strict=True) if label == token]
        return tokenizer.decode(one["input_ids"]), tokenizer.decode(learned)

    return show
