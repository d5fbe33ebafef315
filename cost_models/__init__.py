"""Predictions: pure functions of arrays that say what a choice would cost in seconds and bytes."""
