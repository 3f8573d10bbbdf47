"""Images: decoding, resizing and encoding, and reading them from folders and archives."""
