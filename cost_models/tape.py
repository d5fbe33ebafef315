"""How many bytes of tensors are alive while operators run forward, and while autograd runs them backward.

A ``Tape`` lists the operators of one block in the order they run, each with the tensors that it reads, makes and saves
for backward; ``play`` follows every tensor from birth to death by the rules of torch's autograd, for many configs at
once: sizes are arrays of shape ``[num_configs]``, the list is the same for all of them.

The rules (``torch/csrc/autograd/engine.cpp``, ``input_buffer.cpp``, ``accumulate_grad.cpp``): a tensor lives until its
last reader has run, or, saved, until the backward of the last operator that saved it has; backwards run in the
opposite order; one makes the gradients of all that its operator read, while its own gradient and what it saved are
still there; a second gradient of a tensor is added into the first, unless another tensor shares that one: then the sum
is a third. Gradients of weights live on.

Under recompute (``torch/utils/checkpoint.py``, without reentry) forward leaves the block's input and, selective, what
is kept; backward first runs the operators again, up to the last that saves anything, whose own output is not made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.strategy import Recompute

FloatArray = NDArray[np.float64]
Bytes = FloatArray | float
Meet = Callable[[Bytes, Bytes], None]


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator: tensors by number; ``forward`` and ``backward`` are bytes that exist only while it runs."""

    reads: tuple[int, ...]  # those that get a gradient
    makes: int
    saves: tuple[int, ...]  # storages
    uses: tuple[int, ...]  # storages that must be there: what it reads or looks at, and what it makes
    weights: Bytes | None  # gradients of its weights; None without any
    forward: Bytes
    backward: Bytes
    puts_off: bool  # a matrix whose gradient a split backward works out later
    passes: bool  # its gradient is what it read's gradient too, without a copy
    kept: bool  # selective recompute keeps its output
    repeats: bool  # ``forward`` is taken again where recompute has its output at hand


@dataclass(slots=True)
class Tape:
    """Operators in the order they run. Tensor 0 is what the block is given."""

    given: Bytes
    sizes: list[Bytes] = field(default_factory=list)  # of storages
    storage: list[int] = field(default_factory=list)  # of tensors
    gradients: list[Bytes] = field(default_factory=list)  # of tensors
    operators: list[Operator] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._new(self.given)

    def _new(self, num_bytes: Bytes) -> int:
        self.storage.append(len(self.sizes))
        self.sizes.append(num_bytes)
        self.gradients.append(num_bytes)
        return len(self.storage) - 1

    def run(
        self,
        reads: int | Sequence[int],
        num_bytes: Bytes = 0.0,
        *,
        saves: Iterable[int] = (),
        saves_output: bool = False,
        looks: Iterable[int] = (),
        view_of: int | None = None,
        passes: bool = False,
        weights: Bytes | None = None,
        forward: Bytes = 0.0,
        backward: Bytes = 0.0,
        kept: bool = False,
        puts_off: bool = False,
        repeats: bool = True,
    ) -> int:
        """Add an operator; returns the number of the tensor it makes.

        ``view_of``: the tensor of which the output is a view, of ``num_bytes``. ``looks`` are tensors needed without a
        gradient.
        """
        read = (reads,) if isinstance(reads, int) else tuple(reads)
        if view_of is None:
            made = self._new(num_bytes)
        else:
            self.storage.append(self.storage[view_of])
            self.gradients.append(num_bytes)
            made = len(self.storage) - 1
        saved = [self.storage[tensor] for tensor in saves] + ([self.storage[made]] if saves_output else [])
        used = {self.storage[tensor] for tensor in (*read, *looks, made)} | set(saved)
        self.operators.append(
            Operator(
                reads=read, makes=made, saves=tuple(saved), uses=tuple(used), weights=weights, forward=forward,
                backward=backward, puts_off=puts_off, passes=passes, kept=kept, repeats=repeats,
            )
        )  # fmt: skip
        return made


@dataclass(slots=True)
class Most:
    """The fullest moment: its bytes in all, and of them what forward left and the gradients of weights."""

    total: FloatArray
    activations: FloatArray
    weights: FloatArray


class _Moments:
    """Moments as they are met, of which the fullest is looked for when all have been: the first of equals."""

    def __init__(self, zero: FloatArray) -> None:
        self.zero = zero
        self.met: list[tuple[Bytes, Bytes, Bytes]] = [(zero - 1.0, zero, zero)]

    def meet(self, total: Bytes, activations: Bytes, weights: Bytes) -> None:
        """Take another moment."""
        self.met.append((total, activations, weights))

    def fullest(self) -> Most:
        """The fullest one of each config."""
        table = np.empty((3, len(self.met), len(self.zero)))
        for number, moment in enumerate(self.met):
            for row, value in enumerate(moment):
                table[row, number] = value
        which = table[0].argmax(axis=0)[None]
        return Most(*(np.take_along_axis(each, which, axis=0)[0] for each in table))


LIFETIME_ROWS = 15  # six of its own, and three of each of the three fullest moments


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """Bytes of one block and micro-batch, arrays of shape ``[num_configs]``: the rows of ``table``."""

    table: FloatArray

    @classmethod
    def of(cls, rows: Sequence[FloatArray], most: Sequence[Most]) -> Lifetimes:
        """From the six first rows and the three fullest moments, in the order in which they are read below."""
        found = [row for one in most for row in (one.total, one.activations, one.weights)]
        return cls(np.array([*rows, *found]))

    @classmethod
    def assembled(cls, parts: Sequence[tuple[NDArray[np.int64], Lifetimes]], num_configs: int) -> Lifetimes:
        """Those of several groups of configs, each with the positions it belongs to."""
        table = np.empty((LIFETIME_ROWS, num_configs))
        for positions, part in parts:
            table[:, positions] = part.table
        return cls(table)

    def take(self, rows: NDArray[np.int64]) -> Lifetimes:
        """The configs at these positions."""
        return Lifetimes(self.table[:, rows])

    @property
    def saved(self) -> FloatArray:
        """What forward leaves for backward."""
        return np.asarray(self.table[0])

    @property
    def forward(self) -> FloatArray:
        """The most that is alive in forward, the block's input among it."""
        return np.asarray(self.table[1])

    @property
    def weights(self) -> FloatArray:
        """The gradients of all weights."""
        return np.asarray(self.table[2])

    @property
    def inputs(self) -> FloatArray:
        """What waits for gradients of matrices put off: their inputs, as far as forward left them."""
        return np.asarray(self.table[3])

    @property
    def outputs(self) -> FloatArray:
        """The same: gradients of their outputs, and inputs that were worked out again."""
        return np.asarray(self.table[4])

    @property
    def keeps_input(self) -> FloatArray:
        """1 where the block's input is among what is saved."""
        return np.asarray(self.table[5])

    @property
    def backward(self) -> Most:
        """The fullest moment of the backward, where gradients of weights stay until its end."""
        return Most(*self.table[6:9])

    @property
    def adding(self) -> Most:
        """The same where each is added to earlier ones as it comes."""
        return Most(*self.table[9:12])

    @property
    def deferring(self) -> Most:
        """The same where those of matrices are put off, and input and gradient of each are kept for them."""
        return Most(*self.table[12:15])


def play(tape: Tape, recompute: Recompute, num_configs: int) -> Lifetimes:
    """Follow every tensor of the block through forward and backward."""
    return _Play(tape, recompute, num_configs).lifetimes()


class _Play:
    def __init__(self, tape: Tape, recompute: Recompute, num_configs: int) -> None:
        self.tape, self.recompute, self.num_configs = tape, recompute, num_configs
        self.zero = np.zeros(num_configs)
        self.saves = Counter(storage for operator in tape.operators for storage in operator.saves)
        self.last = max((number for number, operator in enumerate(tape.operators) if operator.saves), default=-1)
        made = {tape.storage[operator.makes] for operator in tape.operators if operator.kept}
        # inputs of matrices
        self.put_off = {storage for operator in tape.operators if operator.puts_off for storage in operator.saves}
        again = recompute is not Recompute.NONE
        kept = made if recompute is Recompute.SELECTIVE else set()
        self.left = {0} | kept if again else set(self.saves)  # storages that forward leaves

    def _bytes(self, storages: Iterable[int]) -> FloatArray:
        return self.zero + sum((self.tape.sizes[storage] for storage in storages), self.zero)

    def lifetimes(self) -> Lifetimes:
        operators = self.tape.operators
        forward, _ = self._run(operators, {0}, self.left)
        met = backward, adding, deferring = tuple(_Moments(self.zero) for _ in range(3))
        gradient = self.zero + self.tape.gradients[operators[-1].makes]
        if self.recompute is not Recompute.NONE:
            # selective: a block's last kept output is never asked for again, and stays
            asked = {storage for operator in operators[: self.last] for storage in operator.uses}
            stays = {0, *self.saves, *(self.left - asked)}  # what was kept goes as it is used
            again, left = self._run(operators[: self.last + 1], set(self.left), stays, stops=True)
            for most in met:
                most.meet(again + gradient, left, self.zero)
        self._backward(gradient, backward, adding, deferring)
        outputs = sum((self.tape.gradients[operator.makes] for operator in operators if operator.puts_off), self.zero)
        weights = sum((operator.weights for operator in operators if operator.weights is not None), self.zero)
        outputs = outputs + self._bytes(self.put_off - self.left)
        rows = (self._bytes(self.left), forward, self.zero + weights, self._bytes(self.put_off & self.left), outputs)
        return Lifetimes.of((*rows, self.zero + (0 in self.left)), [most.fullest() for most in met])

    def _run(
        self, operators: Sequence[Operator], alive: set[int], stays: set[int], *, stops: bool = False
    ) -> tuple[FloatArray, FloatArray]:
        """The most alive while operators run forward, and of that what a forward before has left.

        ``stays`` are storages that outlive their last reader.
        """
        sizes = self.tape.sizes
        # what operators need that are not repeated is there for them all the same
        until = {storage: number for number, operator in enumerate(self.tape.operators) for storage in operator.uses}
        now, left = self._bytes(alive), self._bytes(alive & self.left)
        most, most_left = now, left
        for number, operator in enumerate(operators):
            makes = self.tape.storage[operator.makes]
            own = operator.forward if operator.repeats or makes not in alive else 0.0
            if makes not in alive and not (stops and number == len(operators) - 1):
                alive.add(makes)
                now = now + sizes[makes]
            most_left = np.where(now + own > most, left, most_left)
            most = np.maximum(most, now + own)
            for storage in operator.uses:
                if until[storage] == number and storage in alive and storage not in stays:
                    alive.remove(storage)
                    now = now - sizes[storage]
                    left = left - (sizes[storage] if storage in self.left else 0.0)
        return most, most_left

    def _backward(self, gradient: FloatArray, backward: _Moments, adding: _Moments, deferring: _Moments) -> None:
        tape, sizes = self.tape, self.tape.sizes
        references = self.saves.copy()
        if self.recompute is not Recompute.NONE:  # the checkpoint holds its input, and kept outputs not asked for
            references.update({0: 1})
            asked = {storage for operator in tape.operators[: self.last] for storage in operator.uses}
            references.update({storage: 1 for storage in self.left - asked})
        activations = self._bytes(self.left & set(references))
        now = self._bytes(references) + gradient
        full = self.recompute is Recompute.FULL  # ``executors/weight_gradients.py: _Input``
        grads = _Gradients(tape.operators[-1].makes, gradient, adds_anew=full)
        weights = self.zero
        other, later, later_activations = self.zero, self.zero, self.zero  # of what is not put off; what is kept for it

        def meet(beside: Bytes, own: Bytes, own_other: Bytes = 0.0) -> None:
            backward.meet(now + beside + weights + own, activations, weights + own)
            adding.meet(now + beside + own, activations, self.zero + own)
            meet_deferring(beside, own_other)

        def meet_deferring(beside: Bytes, own_other: Bytes) -> None:
            total = now + beside + other + own_other + later
            deferring.meet(total, activations + later_activations, other + own_other)

        for operator in reversed(tape.operators):
            number = grads.pending.pop(operator.makes, None)
            if number is None:
                continue
            if operator.passes:
                for tensor in operator.reads:
                    grads.shares[number] += 1
                    now = now + grads.take(tensor, number, meet, meet_deferring)
                now = now - grads.drop(number)
                for storage in operator.saves:
                    references[storage] -= 1
                continue
            new = [(tensor, grads.make(tape.gradients[tensor])) for tensor in operator.reads]
            now = now + sum((grads.sizes[each] for _, each in new), self.zero)
            own = 0.0 if operator.weights is None else operator.weights
            own_other = 0.0 if operator.puts_off else own
            meet(operator.backward, own, own_other)
            weights, other = weights + own, other + own_other
            if operator.puts_off:
                later = later + tape.gradients[operator.makes]
            for storage in operator.saves:
                references[storage] -= 1
                if not references[storage]:
                    now = now - sizes[storage]
                    left = sizes[storage] if storage in self.left else 0.0
                    activations = activations - left
                    if storage in self.put_off:
                        later, later_activations = later + sizes[storage], later_activations + left
            now = now - grads.drop(number)
            for tensor, each in new:
                now = now + grads.take(tensor, each, meet, meet_deferring)


class _Gradients:
    """Gradients that wait for the operators they belong to; tensors may share one."""

    def __init__(self, tensor: int, gradient: Bytes, *, adds_anew: bool) -> None:
        self.adds_anew = adds_anew  # where products are put off: torch sees that Python holds the first gradient too
        self.sizes: dict[int, Bytes] = {0: gradient}
        self.shares = Counter({0: 1})
        self.pending = {tensor: 0}

    def make(self, num_bytes: Bytes) -> int:
        number = len(self.sizes)
        self.sizes[number], self.shares[number] = num_bytes, 1
        return number

    def drop(self, number: int) -> Bytes:
        """One holder less; returns the bytes freed."""
        self.shares[number] -= 1
        return 0.0 if self.shares[number] else self.sizes[number]

    def take(self, tensor: int, number: int, meet: Meet, meet_deferring: Meet) -> Bytes:
        """Give a tensor a gradient, its first or one more; returns the bytes by which what is alive changes."""
        first = self.pending.get(tensor)
        if first is None:
            self.pending[tensor] = number
            return 0.0
        if self.shares[first] == 1:
            if self.adds_anew:
                meet_deferring(self.sizes[first], 0.0)
            return -self.drop(number)
        total = self.make(self.sizes[first])
        meet(self.sizes[total], 0.0)
        self.pending[tensor] = total
        return self.sizes[total] - self.drop(first) - self.drop(number)
