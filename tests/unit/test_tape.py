"""Tensors followed from birth to death on small lists of operators, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.cost_models.strategy import Recompute
from meshwright.cost_models.tape import Lifetimes, Tape, play


def lifetimes(tape: Tape, recompute: Recompute = Recompute.NONE) -> Lifetimes:
    return play(tape, recompute, 1)


def two_products() -> Tape:
    """given (10) -> product (20), saves given, weight 7 -> activation (20), saves product -> product (10), weight 5."""
    tape = Tape(10.0)
    first = tape.run(0, 20.0, saves=(0,), weights=7.0, kept=True, puts_off=True)
    active = tape.run(first, 20.0, saves=(first,))
    tape.run(active, 10.0, saves=(active,), weights=5.0, kept=True, puts_off=True)
    return tape


def test_what_forward_leaves() -> None:
    found = lifetimes(two_products())
    assert found.saved == 10 + 20 + 20
    assert found.forward == 10 + 20 + 20 + 10  # all is saved, and the output made beside it
    assert found.weights == 12
    assert found.keeps_input == 1


def test_the_fullest_moment_of_a_backward() -> None:
    # last product: all saved 50, its gradient 10, that of its input 20, its weight's 5; then the activation: 10 + 20 of
    # the saved left over with its own 20, gradients 20 + 20, 5; then the first product: 10, 20 + 10, 5 + 7
    found = lifetimes(two_products()).backward
    assert found.total == 50 + 10 + 20 + 5
    assert found.activations == 50
    assert found.weights == 5


def test_gradients_of_weights_that_are_added_at_once_do_not_stay() -> None:
    tape = Tape(10.0)
    wide = tape.run(0, 10.0, saves=(0,), weights=30.0)
    tape.run(wide, 10.0, saves=(wide,), weights=100.0)
    found = lifetimes(tape)
    # last: saved 20, gradients 10 + 10, weight 100; first: saved 10, gradients 10 + 10, weights 30 and, kept, 100
    assert found.backward.total == 10 + 20 + 130
    assert found.adding.total == 20 + 20 + 100


def test_gradients_of_matrices_put_off_leave_their_inputs_and_outputs() -> None:
    found = lifetimes(two_products())
    assert found.inputs == 10 + 20
    assert found.outputs == 20 + 10
    # at the activation: 10 and 20 of what is saved, 20 + 20 of gradients; kept: input 20 and output 10 of the last
    assert found.deferring.total == max(50 + 10 + 20, 30 + 40 + 30)


def test_a_residual_shares_its_gradient() -> None:
    tape = Tape(10.0)
    inner = tape.run(0, 10.0, saves=(0,))
    tape.run((0, inner), 10.0, passes=True)
    # the sum's gradient is that of both; the product makes another of the input's: saved 10, 10 and 10
    found = lifetimes(tape)
    assert found.saved == 10
    assert found.backward.total == 30


def test_a_sum_with_a_shared_gradient_is_a_tensor_of_its_own() -> None:
    tape = Tape(10.0)
    left, right = tape.run(0, 10.0), tape.run(0, 10.0)
    both = tape.run((left, right), 10.0, passes=True)
    tape.run((both, left), 10.0, passes=True)  # left is read twice: its gradients are the same tensor
    assert lifetimes(tape).backward.total == 10 + 10 + 10  # shared, sum, and a new one of the input


def test_views_take_nothing_forward() -> None:
    tape = Tape(10.0)
    half = tape.run(0, 5.0, view_of=0)
    tape.run(half, 5.0, saves=(half,))
    found = lifetimes(tape)
    assert found.saved == 10  # the whole storage
    assert found.backward.total == 10 + 5 + 5  # then the half's gradient makes a whole one: 5 + 10


def test_full_recompute_leaves_the_input_and_stops_before_the_last_output() -> None:
    found = lifetimes(two_products(), Recompute.FULL)
    assert found.saved == 10
    # again: 10 + 20 + 20, the last product's output not made; with the gradient 10 of the output, then of its input
    assert found.backward.total == 50 + 10 + 20 + 5
    assert found.backward.activations == 10


def test_selective_recompute_keeps_products() -> None:
    found = lifetimes(two_products(), Recompute.SELECTIVE)
    assert found.saved == 10 + 20 + 10  # the last output is kept though nothing asks for it
    assert found.backward.total == 40 + 20 + 10 + 20 + 5
    assert found.backward.activations == 40


def test_sizes_are_arrays() -> None:
    tape = Tape(np.array([1.0, 100.0]))
    tape.run(0, np.array([10.0, 10.0]), saves=(0,), weights=np.array([3.0, 0.0]))
    found = play(tape, Recompute.NONE, 2)
    assert found.saved.tolist() == [1, 100]
    assert found.backward.total.tolist() == [1 + 10 + 1 + 3, 100 + 10 + 100]
    assert found.take(np.array([1, 1])).weights.tolist() == [0, 0]
    assert found.saved == pytest.approx([1, 100])
