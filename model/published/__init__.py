"""Code that is copied into an exported folder, so that transformers can load the model without this project."""
