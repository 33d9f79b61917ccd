"""Frozen networks that judge images. Others' published weights; Flax stays in this folder."""
