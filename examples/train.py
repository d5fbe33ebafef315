"""Train the example Llama as a plan says, on the bytes of a text file; a script to start your own from.

    torchrun --nproc-per-node 2 examples/train.py plan.json text.txt --steps 50

Every rank runs this. Only the lines that call ``parallelize`` and ``parallel`` know of the plan.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from llama import Llama, LlamaConfig
from torch import Tensor

import meshwright
from meshwright.profiler.layers import MlpLayer

REPORT_EVERY = 10


def build_model(plan: meshwright.Plan) -> Llama:
    """The example Llama with the plan's sizes and the same weights on every rank, in host memory.

    Raises ``InputError`` when the plan is for a model that the example is not.
    """
    spec, recipe = plan.model, plan.workload.recipe
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden=spec.hidden,
        num_layers=spec.num_layers,
        num_heads=spec.attention.num_heads,
        num_kv_heads=spec.attention.num_kv_heads,
        ffn_size=next((layer.ffn_size for layer in spec.layers() if isinstance(layer, MlpLayer)), 1),
        tied=spec.tied,
    )
    with torch.device("meta"):
        ours = meshwright.trace_model(Llama(config))
    if ours.blocks != spec.blocks:
        raise meshwright.InputError(f"the plan is for {spec.name}, whose layers the example Llama does not have")
    torch.manual_seed(0)
    return Llama(config).to(getattr(torch, (recipe.master or recipe.params).value))


def batches(text: Tensor, parallel: meshwright.ParallelModel) -> Iterator[tuple[Tensor, Tensor]]:
    """This data rank's share of each global batch: tp and pp peers draw the same, other data ranks other windows."""
    workload = parallel.plan.workload
    rows = parallel.num_microbatches * parallel.plan.config.micro_batch_size
    draw = torch.Generator().manual_seed(parallel.data_rank)
    while True:
        starts = torch.randint(len(text) - workload.seq_len, (rows, 1), generator=draw)
        windows = text[starts + torch.arange(workload.seq_len + 1)]
        yield windows[:, :-1], windows[:, 1:]  # targets are the tokens one place further


def train(plan: meshwright.Plan, text: Tensor, steps: int) -> None:
    """Train ``steps`` steps and print how the loss falls and how long a step takes beside its prediction."""
    parallel = meshwright.parallelize(build_model(plan), plan)
    optimizer = torch.optim.AdamW(parallel.parameter_groups(), lr=1e-3, fused=True)
    predicted = f"{plan.cost.step_s:.3g} s" if plan.cost else "nothing"
    started = time.perf_counter()
    for number, batch in zip(range(1, steps + 1), batches(text, parallel), strict=False):
        loss = parallel.step(batch)
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number % REPORT_EVERY == 0:
            mean, now = float(loss), time.perf_counter()  # the loss is the same on every rank
            step_s, started = (now - started) / REPORT_EVERY, now
            speed = plan.workload.tokens_per_step / step_s
            if dist.get_rank() == 0:
                times = f"{step_s:.3g} s a step (predicted {predicted})"
                print(f"step {number}: loss {mean:.3f}, {times}, {speed:,.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the example Llama as a plan says.")
    parser.add_argument("plan", type=Path)
    parser.add_argument("text", type=Path, help="any text file longer than one sequence")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    plan = meshwright.load_plan(arguments.plan)
    text = torch.tensor(list(arguments.text.read_bytes()))
    if plan.model.vocab_size < 256 or len(text) <= plan.workload.seq_len:
        raise SystemExit("bytes need a vocabulary of 256 entries, and a text longer than one sequence")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        train(plan, text, arguments.steps)
    except meshwright.Error as error:
        raise SystemExit(f"train.py: {error}") from None
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
