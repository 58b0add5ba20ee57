"""Studies made of many runs."""
