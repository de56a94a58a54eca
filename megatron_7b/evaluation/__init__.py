"""How good a model is: its loss on a corpus."""
