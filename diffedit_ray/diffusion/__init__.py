"""The method: DiffEdit's three steps on a latent diffusion model. Torch only."""
