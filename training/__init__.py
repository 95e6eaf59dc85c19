"""Everything that training needs besides the network: configuration, data, diffusion mathematics, checkpoints."""
