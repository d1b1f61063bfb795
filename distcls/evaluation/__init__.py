"""How good a model is: metrics, the evaluation of a split, and their plots."""
