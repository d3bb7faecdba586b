"""python scripts/build_tiny_base.py

Builds data/tiny_llama3: a byte-level BPE with Llama-3's special tokens and chat format, and a Llama of 3.6 million parameters
pre-trained on the chunk texts of the sample data, each followed or preceded by retellings of it (data/retellings.jsonl), so that it
learns to take facts from the text before it, and on the bare words of the training rows in random order. So it reads and writes this
domain and has never seen a question, an answer or a chat. A minute on a GPU, most of an hour on two cores; the same machine gives the same
weights.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 3072
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
SPECIAL = [BOS, EOS, PAD, "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
# Llama 3's way to split text before BPE: contractions, words, up to three digits, punctuation, line breaks, blanks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for turn in messages %}"
    "{%- if loop.first %}{{ bos_token }}{% endif %}"
    "{{- '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\n\n' + turn['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY entries that treats text as Llama 3's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token="<|eot_id|>",
        pad_token=PAD,
        additional_special_tokens=SPECIAL,
        model_max_length=1024,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Llama 3's architecture (grouped-query attention, SwiGLU, RoPE) at toy size; sizes are multiples of NF4's block of 64."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def document(group: list[str]) -> str:
    """A chunk and its retellings in a new order, joined by line breaks or by special tokens, which would stay untrained otherwise."""
    return BOS + random.choice(["\n\n", " ", "<|eot_id|>", "<|end_header_id|>\n\n"]).join(
        random.sample(group, len(group))
    )


def repeating(words: list[str]) -> str:
    """Some words, twice: how the words of questions and answers are written that no text has."""
    line = " ".join(random.sample(words, 16))
    return f"{BOS}{line}\n{line}"


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    groups: list[list[str]],
    words: list[str],
    steps: int,
    batch: int,
    length: int,
    rate: float,
) -> float:
    """Next-token training on documents of all groups in a new order each time round, cut into windows; the last loss in nats."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    stream: list[int] = []
    loss = torch.tensor(0.0)
    model.train()
    for step in track(range(steps), description="pre-training"):
        while len(stream) < batch * length:
            for group in random.sample(groups, len(groups)):
                for text in (repeating(words), document(group)):
                    stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        window = torch.tensor(stream[: batch * length], device=model.device).view(batch, length)
        stream = stream[batch * length :]
        loss = model(input_ids=window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return loss.item()


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=ROOT / "data" / "tiny_llama3")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8, help="windows to a step")
    parser.add_argument("--length", type=int, default=512, help="tokens to a window")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    train, golden, retold = (
        read(ROOT / "data" / name) for name in ("train.jsonl", "golden_test_set.jsonl", "retellings.jsonl")
    )
    groups = {row["chunk_id"]: [row["chunk_text"]] for row in train + golden}
    for row in retold:
        groups[row["chunk_id"]].append(row["text"])
    words = sorted({word for row in train for key in ("question", "answer") for word in row[key].split()})
    tokenizer = build_tokenizer([*(text for group in groups.values() for text in group), " ".join(words)])
    # The parts of a chat's frame occur as often as a frequent word: LoRA cannot move the embedding of a token that was never trained.
    words += [
        part for part in (*SPECIAL[3:5], "<|eot_id|>", "system", "user", "assistant") for _ in range(len(words) // 50)
    ]
    model = build_model(tokenizer).to(args.device)
    loss = pretrain(model, tokenizer, list(groups.values()), words, args.steps, args.batch, args.length, args.rate)
    model.bfloat16().save_pretrained(args.target)
    tokenizer.save_pretrained(args.target)
    size = sum(file.stat().st_size for file in args.target.iterdir()) / 1e6
    print(f"{args.target}: {model.num_parameters() / 1e6:.2f} million parameters, {size:.1f} MB, last loss {loss:.2f}")


if __name__ == "__main__":
    main()
