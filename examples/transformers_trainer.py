"""RST in transformers' Trainer: a mixin; the Trainer accumulates, clips, saves and resumes as ever.

python examples/transformers_trainer.py output  # again after an interruption, and it goes on
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from rst import Linear
from rst.integrations.transformers import RSTMixin

WORDS, LENGTH = 20, 12


class RSTTrainer(RSTMixin, Trainer):
    pass


def data(size: int) -> list[dict[str, torch.Tensor]]:
    """Stands for yours: texts that count by ones, twos or threes."""
    first, stride = torch.randint(WORDS, (size, 1)), torch.randint(1, 4, (size, 1))
    texts = (first + stride * torch.arange(LENGTH)) % WORDS
    return [{"input_ids": text, "labels": text} for text in texts]


def main(folder: str) -> None:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    arguments = TrainingArguments(
        folder,
        num_train_epochs=3,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        warmup_steps=4,
        max_grad_norm=1.0,
        logging_strategy="epoch",
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RSTTrainer(
        LlamaForCausalLM(config),
        arguments,
        train_dataset=data(256),
        rst={"schedule": Linear(0.0, 1.0), "rho": 0.05},
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    print(f"{trainer.optimizer.optimizer.propagations} propagations")


if __name__ == "__main__":
    main(sys.argv[1])
