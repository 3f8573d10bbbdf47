"""Evaluating a trained model on questions with known answers."""
