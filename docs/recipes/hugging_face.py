"""Hugging Face: transformers.Trainer fine-tunes a small transformer whose last layer is solved. Nothing is downloaded.

Run: python hugging_face.py (needs transformers and accelerate)
"""

from __future__ import annotations

import tempfile

import torch
from cfl_ops.learn import ClosedFormLinear
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel, Trainer, TrainingArguments, set_seed


class Classifier(torch.nn.Module):
    """Returns a loss where labels are given, as Trainer wants it. Trainer's optimizer leaves the head out by itself."""

    def __init__(self, config: BertConfig, lam: float = 1.0) -> None:
        super().__init__()
        self.encoder = BertModel(config, add_pooling_layer=False)  # or BertModel.from_pretrained(...)
        self.head = ClosedFormLinear(config.hidden_size, config.num_labels, lam=lam)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        features = self.encoder(input_ids).last_hidden_state[:, 0]
        if labels is None:
            return {"logits": self.head(features)}
        loss = self.head.loss(features, labels)  # solves in train mode; in eval mode the present head's loss
        return {"loss": loss, "logits": self.head(features)}


class Sequences(Dataset):
    """Sequences of 15 tokens with one of four marked tokens somewhere; the label is which."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(6, 32, (count, 16), generator=generator)
        self.labels = torch.randint(4, (count,), generator=generator)
        place = torch.randint(1, 16, (count, 1), generator=generator)
        self.tokens.scatter_(1, place, 2 + self.labels.unsqueeze(1))
        self.tokens[:, 0] = 1  # [CLS]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def main(epochs: int = 2, batch: int = 32, folder: str | None = None) -> tuple[Trainer, float]:
    set_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=4,
    )  # fmt: skip
    options = TrainingArguments(
        output_dir=folder or tempfile.mkdtemp(), num_train_epochs=epochs, per_device_train_batch_size=batch,
        per_device_eval_batch_size=256, learning_rate=2e-3, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_steps=32,
    )  # fmt: skip

    def error(prediction) -> dict[str, float]:
        return {"error": float((prediction.predictions.argmax(-1) != prediction.label_ids).mean())}

    trainer = Trainer(
        Classifier(config),
        options,
        train_dataset=Sequences(1024, 0),
        eval_dataset=Sequences(512, 1),
        compute_metrics=error,
    )
    trainer.train()
    measured = trainer.evaluate()
    print(f"test loss {measured['eval_loss']:.4f}, error {measured['eval_error']:.2%}")
    return trainer, measured["eval_error"]


if __name__ == "__main__":
    main()
