"""Measuring: what a trained model and the code that trains it are worth, in numbers."""
