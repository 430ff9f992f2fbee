"""Record what code allocates on fake tensors, and derive what a deeper model allocates."""
