"""Images: decoding, resizing, encoding, and finding them in folders and archives."""
