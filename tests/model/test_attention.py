"""The attention that a model is trained with follows from what its own layers are passed."""

import pytest
from tiny_families import FAMILIES

from intern.model.attention import Attention, choose_attention

ISOLATED = Attention("isolated", packs=True)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_vision", "mixtral", "phi3"])
def test_isolated_attention_is_taken_if_a_model_passes_it_where_rows_begin(name):
    assert choose_attention(FAMILIES[name](), "isolated", 512) == ISOLATED


@pytest.mark.parametrize(
    ("name", "chosen", "packs", "why"),
    [
        (
            "nemotron",
            "sdpa",
            True,
            "where rows begin",
        ),  # its layers drop the rows' boundaries: packed rows would see each other
        ("stablelm", "sdpa", True, "where rows begin"),
        ("gemma2", "eager", True, "softcap"),
        (
            "gpt_oss",
            "eager",
            False,
            "s_aux",
        ),  # its masks are made without positions, so packed rows would see each other
        ("falcon", None, False, "attention of its own"),
        ("bloom", None, False, "attention of its own"),
        ("granitemoehybrid", "isolated", False, None),  # carries a state from row to row
        ("qwen3_5", "isolated", False, None),
    ],
)
def test_a_model_that_cannot_have_it_gets_what_it_can_have(name, chosen, packs, why):
    found = choose_attention(FAMILIES[name](), "isolated", 512)
    assert (found.name, found.packs) == (chosen, packs)
    assert found.instead is None if why is None else why in found.instead


def test_rows_longer_than_a_sliding_window_are_attended_with_a_mask():
    config = FAMILIES["gemma3_text"]()  # a window of 1,024 tokens
    assert choose_attention(config, "isolated", 1024) == ISOLATED
    assert choose_attention(config, "isolated", 1025).name == "sdpa"
    assert choose_attention(config, "isolated") == ISOLATED  # a model that only answers


def test_the_users_own_choice_stays_and_the_configuration_is_not_changed():
    config = FAMILIES["llama"]()
    before = config.to_json_string()
    assert choose_attention(config, "sdpa", 512) == Attention("sdpa", packs=True)
    assert choose_attention(FAMILIES["bloom"](), "eager", 512) == Attention("eager", packs=False)
    assert config.to_json_string() == before
