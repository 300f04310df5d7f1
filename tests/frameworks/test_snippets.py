"""The documentation's code that needs a framework, as tests/test_docs.py runs the rest."""

import pytest
import torch
from test_docs import CODE, OF_FRAMEWORKS, PAGES, run_python
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainingArguments

BLOCKS = [
    block for page in PAGES for _, block in CODE.findall(page.read_text()) if OF_FRAMEWORKS.search(block)
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: OF_FRAMEWORKS.search(block)[1])
def test_it_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = TensorDataset(torch.randn(32, 4), torch.arange(32) % 3)
    names = {"loader": DataLoader(data, batch_size=8)}
    if "transformers" in block:
        names["model"] = Net()
        names["arguments"] = TrainingArguments("run", max_steps=2, report_to="none", use_cpu=True)
        names["dataset"] = [{"x": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(8)]
    run_python(block, **names)


class Net(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(super().forward(x), labels)}
