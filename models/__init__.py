"""What a model is: config, architectures, weight readers, tokenizer files, the catalog."""
