"""The predictions of docs/theory.md at reduced size, and the committed results of `make theory`."""

import sys

import pytest
import torch
from conftest import ROOT

from rst import RST, Linear

sys.path.insert(0, str(ROOT))
from scripts.theory.chains import Chains


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_chains_that_advance_together_are_runs_of_their_own(gamma):
    """With coins and norms of their own: each step is that of a single RST on that run's problem."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn((20, 3, 5), generator=generator, dtype=torch.float64)
    start = torch.zeros(5, dtype=torch.float64)
    options = {"rho": 0.5, "gamma": gamma}
    chains = Chains(start, [7, 8, 9], Linear(0.2, 1.0), 20, lr=0.003, **options)
    for t in range(20):
        chains.step(lambda theta, runs, t=t: (theta - targets[t, runs]).pow(4).sum(1))
    for run, seed in enumerate([7, 8, 9]):
        theta = torch.nn.Parameter(start.clone())
        optimizer = RST(torch.optim.SGD([theta], 0.003), Linear(0.2, 1.0), 20, seed=seed, **options)
        for t in range(20):
            for _ in optimizer.passes():
                (theta - targets[t, run]).pow(4).sum().backward()
            optimizer.step()
        torch.testing.assert_close(chains.theta[run], theta.detach(), rtol=1e-12, atol=1e-12)
