"""Single weights become zero and every shape stays: magnitude pruning at high sparsity."""
