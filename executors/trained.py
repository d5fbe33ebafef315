"""A split model with its optimizer and a batch of random tokens: what ``run`` times and ``dry_run`` counts."""

from __future__ import annotations

import torch
from torch import Tensor

from meshwright.cost_models.workload import Optimizer
from meshwright.executors.parallel_model import ParallelModel
from meshwright.planner.plan import Plan

MAX_NORM = 1.0
LEARNING_RATE = 1e-4


class Trained:
    """One plan's model, optimizer and batch on this rank."""

    def __init__(self, parallel: ParallelModel, plan: Plan, device: torch.device) -> None:
        self.parallel = parallel
        groups = parallel.parameter_groups()
        self.optimizer: torch.optim.Optimizer
        if plan.workload.optimizer is Optimizer.SGD:
            self.optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
        rows = parallel.num_microbatches * plan.config.micro_batch_size
        draw = torch.Generator().manual_seed(parallel.data_rank)
        tokens = torch.randint(plan.model.vocab_size, (rows, plan.workload.seq_len + 1), generator=draw).to(device)
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(self) -> Tensor:
        """One training step: forward, backward, clipping, the optimizer."""
        loss = self.parallel.step(self.batch)
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def clip(self) -> None:
        """Scale gradients to ``MAX_NORM``."""
        self.parallel.clip_grad_norm_(MAX_NORM)
