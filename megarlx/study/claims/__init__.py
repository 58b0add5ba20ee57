"""The claims of the paper about placing RL in pre-training, judged from a study's runs."""
