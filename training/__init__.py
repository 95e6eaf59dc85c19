"""Everything the main job needs besides the network: configuration, data, diffusion mathematics, checkpoints."""
