"""What is learned from: episodes, played with the weights as they are, and their worth."""
