"""Action: a plan applied to a torch model, run, checked and measured."""
