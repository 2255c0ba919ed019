"""Lightning: manual optimisation, and automatic optimisation. Run: python lightning_manual.py."""

from __future__ import annotations

import lightning
import torch
from cfl_ops.learn import ClosedFormLinear
from plain_loop import digits, error_rate
from torch.utils.data import DataLoader


class Manual(lightning.LightningModule):
    """The loop is ours."""

    def __init__(self, lam: float = 1.0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU())
        self.head = ClosedFormLinear(128, 10, lam=lam)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.head.loss(self.backbone(x), y)
        self.manual_backward(loss)  # scales it under mixed precision
        optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.backbone.parameters(), lr=0.1, momentum=0.9)


class Automatic(Manual):
    """The loop is Lightning's, since ``head.loss`` is a loss like any other."""

    def __init__(self, lam: float = 1.0) -> None:
        super().__init__(lam)
        self.automatic_optimization = True

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        return self.head.loss(self.backbone(x), y)


def main(
    kind: type[Manual] = Manual, epochs: int = 5, batch: int = 32, folder: str | None = None
) -> tuple[Manual, float]:
    lightning.seed_everything(0, verbose=False)
    train, test = digits()
    model = kind()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, DataLoader(train, batch, shuffle=True))
    error = error_rate(model.backbone, model.head, test)
    print(f"{kind.__name__}: test error {error:.2%}")
    return model, error


if __name__ == "__main__":
    main(Manual)
    main(Automatic)
