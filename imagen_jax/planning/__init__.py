"""The parts of `imagen_jax.plan`: compiling ahead of time, reading HLO, rooflines, the report."""
