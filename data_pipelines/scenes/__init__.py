"""Procedural captioned vector scenes: sampling, drawing, and a checker that reads pictures back."""
