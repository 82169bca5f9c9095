"""The paper's own benchmarks: loaders, recipes, training by doran-hf, and what of it is missing on this machine."""
