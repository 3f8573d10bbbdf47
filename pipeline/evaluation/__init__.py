"""Evaluation of a trained model on questions with known answers."""
