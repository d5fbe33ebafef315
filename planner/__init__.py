"""Choice: every legal way to split a model, scored; the best one, why, and how sure."""
