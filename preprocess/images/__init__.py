"""Image codec (decoding, resizing, encoding), and reading image files from folders and archives."""
