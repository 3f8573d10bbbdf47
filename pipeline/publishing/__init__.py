"""The files of an exported folder besides weights and configuration, such as the tokenizer and the model card."""
