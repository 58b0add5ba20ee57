"""What early RL leaves: the arms of configs/kept.toml, read off finished runs by their names."""
