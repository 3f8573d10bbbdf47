"""Web page on the local machine for asking a model about images."""
