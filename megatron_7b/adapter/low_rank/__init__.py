"""Low-rank updates of matrices: W + s B A, with a small A and B for each projection (LoRA, rsLoRA, DoRA)."""
