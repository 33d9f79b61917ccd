"""The denoising networks; independent of config files, meshes and diffusion."""
