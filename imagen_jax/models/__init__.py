"""The denoising networks. They know nothing of config files, meshes or diffusion."""
