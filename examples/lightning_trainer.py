"""RST in Lightning: a callback; the Trainer clips, scales losses, logs and saves checkpoints as ever.

python examples/lightning_trainer.py
"""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rst import RST, Linear
from rst.integrations.lightning import RSTCallback


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = RST(
            torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9),
            schedule=Linear(0.0, 1.0),
            total_steps=self.trainer.estimated_stepping_batches,
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, optimizer.total_steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def main() -> None:
    seed_everything(0)
    x = torch.randn(512, 20)  # stands for your data
    y = (x @ torch.randn(20, 4)).argmax(1)
    trainer = Trainer(
        max_epochs=3,
        gradient_clip_val=1.0,
        callbacks=[RSTCallback()],
        precision="bf16-mixed",
        enable_progress_bar=False,
    )
    classifier = Classifier()
    trainer.fit(classifier, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    accuracy = (classifier.model(x).argmax(1) == y).float().mean()
    print(f"{trainer.optimizers[0].propagations} propagations, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
