"""Operators that all kinds of blocks are made of, written onto a ``Tape``: norms, projections, ends of regions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.strategy import ConfigBatch
from meshwright.cost_models.tape import Bytes, Tape
from meshwright.cost_models.workload import Workload
from meshwright.profiler.layers import MlpLayer, NormKind, NormLayer

FloatArray = NDArray[np.float64]


class Writer:
    """Writes the operators of one block, for configs whose lists of operators are the same.

    They are all split over the same axes, recompute alike, and have as many ``ep_chunks``. ``tokens`` are those of one
    micro-batch on one rank (a part of the sequence under cp), ``shard`` those between the regions that tp splits.
    """

    def __init__(self, workload: Workload, batch: ConfigBatch) -> None:
        self.batch = batch
        self.size = float(workload.recipe.compute.num_bytes)
        self.wide = max(self.size, 4.0)
        self.seq_len = workload.seq_len
        self.split = bool((batch.tp > 1).any())
        self.sequence_parallel = bool(batch.sequence_parallel.any())
        self.tp = batch.tp.astype(np.float64)
        self.tokens = batch.micro_batch_size * (workload.seq_len / batch.cp)
        self.shard = self.tokens / self.tp if self.sequence_parallel else self.tokens
        self.several = batch.micro_batch_size > 1
        self.exchanges = bool((batch.ep > 1).any())  # rows of tokens go to other ranks' experts
        self.gathers_rows = bool((batch.etp > 1).any()) and (self.sequence_parallel or not self.split)
        self.expert_chunks = int(batch.ep_chunks.max(initial=1))
        self.recomputes = bool(batch.recompute.any())
        self.in_decoder = False
        self.tape = Tape(0.0)

    def add(self, left: int, right: int) -> int:
        """A sum, whose gradient is both's."""
        return self.tape.run((left, right), self.bytes_of(left), passes=True)

    def bytes_of(self, tensor: int) -> Bytes:
        """Of its storage."""
        return self.tape.sizes[self.tape.storage[tensor]]

    def wider(self, x: int) -> int:
        """``x.float()``: itself where it is no half type."""
        if self.wide == self.size:
            return x
        return self.tape.run(x, self.tape.gradients[x] * (self.wide / self.size))

    def narrower(self, x: int) -> int:
        """Back from ``wider``."""
        if self.wide == self.size:
            return x
        return self.tape.run(x, self.bytes_of(x) * (self.size / self.wide))

    def norm(self, layer: NormLayer, x: int) -> int:
        """LayerNorm, which is one kernel, or an RMSNorm."""
        if layer.norm_kind is NormKind.LAYER:
            return self.tape.run(x, self.bytes_of(x), saves=(x,), weights=0.0)
        return self.rms_norm(x)

    def rms_norm(self, x: int) -> int:
        """``weight * (x32 * rsqrt(x32.pow(2).mean() + eps)).to(x.dtype)``; a number a row is left out.

        In backward the weight's gradient is a whole tensor before it is summed.
        """
        run = self.tape.run
        wide = self.wider(x)
        size = self.tape.gradients[wide]
        squares = run(wide, size, saves=(wide,), backward=2.0 * size)  # 2 * x.pow(1), times the gradient
        mean = run(squares, 0.0)
        normed = run((wide, mean), size, saves=(wide,), backward=size)  # a row's gradient before it is summed
        narrow = self.narrower(normed)
        return run(narrow, self.bytes_of(narrow), saves=(narrow,), weights=0.0, backward=self.bytes_of(narrow))

    def linear(
        self, x: int, rows: Bytes, inputs: Bytes, outputs: Bytes, *, bias: bool = False, row_split: bool = False
    ) -> int:
        """A projection of ``rows`` tokens; its weight's gradient is made beside its input's."""
        weights = (inputs * outputs + (outputs if bias else 0.0)) * self.size
        kept = not (row_split and self.split)  # of a product split by rows the sum over tp is kept
        return self.tape.run(
            x, rows * outputs * self.size, saves=(x,), weights=weights, kept=kept, puts_off=self.in_decoder
        )

    # -- ends of a region under tensor parallelism ----------------------------------------------------------------

    def enter(self, x: int, hidden: int) -> int:
        """Into a column split: itself, its gradient summed over tp; with sequence parallelism gathered."""
        if not self.split:
            return x
        whole = self.tokens * hidden * self.size
        if not self.sequence_parallel:
            return self.tape.run(x, whole, view_of=x)
        copied = np.where(self.several, whole, 0.0)  # shards side by side, then laid out by sequence
        return self.tape.run(x, whole, kept=True, forward=copied, backward=copied)

    def leave(self, x: int, *, bias: bool = False) -> int:
        """Out of a row split: summed over tp, with sequence parallelism scattered; then the bias is added."""
        if not self.split:
            return x
        whole = self.bytes_of(x)
        if not self.sequence_parallel:
            x = self.tape.run(x, whole, passes=True, kept=True)
        else:
            copied = np.where(self.several, whole, 0.0)
            x = self.tape.run(x, whole / self.tp, kept=True, forward=copied, backward=copied)
        return self.tape.run(x, self.bytes_of(x), passes=True) if bias else x

    # -- feed-forward -----------------------------------------------------------------------------------------------

    def mlp(self, layer: MlpLayer, x: int) -> int:
        """From the region's input to the product of its row split."""
        run, ffn = self.tape.run, layer.ffn_size / self.tp
        if layer.gated:
            gate = self.linear(x, self.tokens, layer.hidden, ffn, bias=layer.bias)
            active = self.activation(layer.activation, gate)
            up = self.linear(x, self.tokens, layer.hidden, ffn, bias=layer.bias)
            inner = run((active, up), self.bytes_of(up), saves=(active, up))
        else:
            inner = self.activation(layer.activation, self.linear(x, self.tokens, layer.hidden, ffn, bias=layer.bias))
        return self.linear(inner, self.tokens, ffn, layer.hidden, bias=layer.bias, row_split=True)

    def activation(self, name: str, x: int) -> int:
        """Elementwise; what transformers writes out runs operator by operator."""
        run, size = self.tape.run, self.bytes_of(x)
        if name == "relu":
            return run(x, size, saves_output=True)
        if name != "gelu_new":
            return run(x, size, saves=(x,))
        # 0.5 * x * (1 + tanh(c * (x + 0.044715 * x.pow(3)))): transformers' NewGELUActivation
        half = run(x, size)
        cube = run(x, size, saves=(x,), backward=2.0 * size)
        inside = run((x, run(cube, size)), size, passes=True)
        tanh = run(run(inside, size), size, saves_output=True)
        plus = run(tanh, size, passes=True)
        return run((half, plus), size, saves=(half, plus))
