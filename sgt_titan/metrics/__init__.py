"""What is measured on obfuscated embeddings: pure functions of local tensors."""
