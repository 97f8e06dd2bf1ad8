"""Writes what the configurations beside this file train: a Llama of 0.3 million parameters with random weights, a
tokenizer, and 200 docstrings of the standard library as prompts and completions. Nothing is downloaded.

python examples/frameworks/tiny_model.py memtrace-runs/frameworks
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

sys.path.append(str(Path(__file__).resolve().parents[1]))

from stdlib_docstrings import MODULES, load_docstrings

EVERY = 14
CHAT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"


def write_tokenizer(texts: list[str], directory: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), special, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **names)
    fast.chat_template = CHAT
    fast.save_pretrained(directory)
    return fast


def main() -> None:
    directory = Path(sys.argv[1])
    model_directory = directory / "model"
    docstrings = load_docstrings()[::EVERY]
    tokenizer = write_tokenizer([docstring.text for docstring in docstrings], model_directory)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(model_directory)
    rows = [{"prompt": f"Describe something of {MODULES[one.label]}.", "completion": one.text} for one in docstrings]
    (directory / "docstrings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "prompt", "response": "completion"}
    description = {"docstrings": {"file_name": "docstrings.jsonl", "columns": columns}}
    (directory / "dataset_info.json").write_text(json.dumps(description))  # LLaMA-Factory asks for it


if __name__ == "__main__":
    main()
